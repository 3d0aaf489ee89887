/*
 * One row of tools/killpoints.py: an operation at a stage of the heap.
 *
 *     killpoints --list
 *     killpoints OPERATION STAGE SHARE OF SEED DOUBLE KILLS STOP
 *
 * Tries the points SHARE of OF (every OF-th, starting somewhere), then DOUBLE deaths that are
 * followed by deaths in the recovery, then KILLS real ones. STOP 1: ends at the first that is not
 * survived. Prints one JSON object.
 */
#include "killpoints.h"

#include <ctype.h>
#include <linux/futex.h>
#include <sched.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#define PEERS         2u
#define MAX_FAILURES  3u
#define ROLLBACK      1000u /* instructions of the recovery at each of which it dies: the locks */
#define DOUBLE_STRIDE 1000u /* ... and, on average, between two deaths from there on */

struct tally {
    uint64_t tried, states, survived;
    bool alive; /* the last verdict */
};

/* Some of the points at which the victim holds a mutex, or a process lock. */
enum kind {
    MUTEX,
    PROCESS_LOCK,
    NKINDS
};
struct moments {
    uint64_t at[32], seen;
};

struct row {
    const struct op *op;
    enum stage stage;
    uint64_t share, of, doubles, kills;
    struct rng rng;
    bool stop;
    uint64_t instructions;
    struct tally single, twice, real;
    uint64_t same; /* real deaths that left, byte by byte, what the copy had */
    struct moments held[NKINDS];
    uint64_t waits[NKINDS][256], nwaits[NKINDS]; /* ns from the death to the lock */
    uint32_t nfailures;
};

static bool failed(const struct row *r)
{
    return r->single.survived != r->single.tried || r->twice.survived != r->twice.tried ||
           r->real.survived != r->real.tried;
}

static void say_failure(struct row *r, const char *kind, uint64_t at, uint64_t then)
{
    if (r->nfailures++ < MAX_FAILURES)
        fprintf(stderr, "%s, %s: %s death after instruction %llu (%llu): %s\n", r->op->name,
                stage_names[r->stage], kind, (unsigned long long)at, (unsigned long long)then,
                failure);
}

/* A death at this point, in a copy. What the point before it left needs no second trial. `led`: the
 * victim is the coordinator; else one that lives finds it dead, or the successor of one, in turn.
 */
static bool death(struct scene *s, struct view *v, struct victim *victim, bool led, struct tally *t)
{
    bool is_new = view_look(v, victim_mutexes(victim, v)) || t->tried == 0;
    t->tried++;
    if (is_new) {
        bool idle = sh_phase_of(atomic_load(&view_header(v)->phase)) == SH_IDLE;
        t->alive = survives(s, v, led || !idle || t->states % 2 == 0);
        t->states++;
    }
    t->survived += t->alive;
    return t->alive;
}

/* Deaths in the recovery from this death: the copy is the arena, whoever recovers is the victim. */
static void die_twice(struct row *r, struct scene *s, const struct view *first, uint64_t at)
{
    struct scene again = *s;
    struct view v;
    struct victim victim;
    struct tally t = {0};
    again.fd = view_copy(first);
    void *held = hold_witness(s, again.fd);
    view_open(&v, again.fd, false);
    victim_start(&victim, &again, recover_alone);
    uint64_t next = 1;
    while (victim_step(&victim) && !(r->stop && failed(r))) {
        if (victim.instructions < next)
            continue;
        next += victim.instructions < ROLLBACK ? 1 : 1 + rng_below(&r->rng, 2 * DOUBLE_STRIDE);
        if (!death(&again, &v, &victim, true, &t))
            say_failure(r, "second", at, victim.instructions);
    }
    r->twice.tried += t.tried;
    r->twice.survived += t.survived;
    victim_kill(&victim);
    view_close(&v);
    sh_os_let_go(held);
    close(again.fd);
}

/* The slot whose process lock the victim holds; SH_NIL: none. */
static uint32_t slot_locked(const struct scene *s, const struct victim *victim)
{
    for (uint32_t i = 0; victim->shared->owner != 0 && i < 16; i++)
        if (atomic_load(&sh_slot(&s->witness, i)->lock) == (victim->shared->owner | 1))
            return i;
    return SH_NIL;
}

/* Each has the same chance to be remembered. */
static void remember(struct row *r, enum kind kind, uint64_t at)
{
    struct moments *m = &r->held[kind];
    const uint64_t room = sizeof m->at / sizeof m->at[0];
    uint64_t i = m->seen < room ? m->seen : rng_below(&r->rng, (uint32_t)m->seen + 1);
    m->seen++;
    if (i < room)
        m->at[i] = at;
}

/* A point at which such a lock is held; any, if there is none. */
static uint64_t moment(struct row *r, enum kind kind)
{
    const struct moments *m = &r->held[kind];
    const uint64_t room = sizeof m->at / sizeof m->at[0];
    if (m->seen == 0)
        return rng_below(&r->rng, (uint32_t)r->instructions);
    return m->at[rng_below(&r->rng, (uint32_t)(m->seen < room ? m->seen : room))];
}

static void die_at_each(struct row *r)
{
    struct scene s;
    struct view v;
    struct victim victim;
    uint64_t first = rng_below(&r->rng, (uint32_t)r->of) + r->share;
    scene_make(&s, r->op, r->stage);
    victim_start(&victim, &s, r->op->act);
    view_open(&v, s.fd, r->of == 1);
    do {
        if ((victim.instructions + first) % r->of != 0)
            continue;
        if (!death(&s, &v, &victim, r->op->flags & LEADS, &r->single))
            say_failure(r, "a", victim.instructions, 0);
        if (v.died != 0)
            remember(r, MUTEX, victim.instructions);
        else if (slot_locked(&s, &victim) != SH_NIL)
            remember(r, PROCESS_LOCK, victim.instructions);
    } while (victim_step(&victim) && !(r->stop && failed(r)));
    r->instructions = victim.instructions;
    victim_kill(&victim);
    view_close(&v);
    scene_end(&s);
}

/* The victim again, stopped after so many instructions. */
static void run_to(struct row *r, uint64_t at, struct scene *s, struct view *v,
                   struct victim *victim)
{
    scene_make(s, r->op, r->stage);
    victim_start(victim, s, r->op->act);
    while (victim->instructions < at && victim_step(victim)) {
    }
    view_open(v, s->fd, false);
    view_look(v, victim_mutexes(victim, v));
}

static void die_twice_at(struct row *r, uint64_t at)
{
    struct scene s;
    struct view v;
    struct victim victim;
    run_to(r, at, &s, &v, &victim);
    die_twice(r, &s, &v, at);
    victim_kill(&victim);
    view_close(&v);
    scene_end(&s);
}

/* Real deaths, with peers that wait for the lock that the victim has */

struct peer {
    pid_t pid;
    _Atomic uint32_t tries;
    _Atomic uint64_t has_it_ns;
};

/* So that the other work of the machine is not measured, where that is allowed. */
static void ahead_of_others(pid_t pid)
{
    const struct sched_param first = {.sched_priority = 1};
    sched_setscheduler(pid, SCHED_FIFO, &first);
}

static void be_peer(struct scene *s, uint32_t died, uint32_t slot, struct peer *p)
{
    struct sh_ctx *c = &s->witness;
    struct sh_lock *const locks[] = {&c->hdr->registry, &c->hdr->roots, &c->hdr->heap};
    cpu_set_t all;
    memset(&all, 0xff, sizeof all);
    sched_setaffinity(0, sizeof all, &all);
    ahead_of_others(0);
    alarm(20);
    atomic_store(&p->tries, 1);
    if (died != 0) {
        struct sh_lock *l = locks[__builtin_ctz(died)];
        CHECK_OK(sh_lock(c, l, 10000));
        atomic_store(&p->has_it_ns, sh_os_now_ns());
        sh_unlock(c, l);
    } else {
        CHECK_OK(sh_process_lock(c, sh_slot(c, slot), 10000));
        atomic_store(&p->has_it_ns, sh_os_now_ns());
        sh_process_unlock(sh_slot(c, slot));
    }
    _exit(0);
}

static bool sleeps(pid_t pid)
{
    char path[64], line[256];
    snprintf(path, sizeof path, "/proc/%d/stat", pid);
    FILE *f = fopen(path, "r");
    CHECK(f != NULL && fgets(line, sizeof line, f) != NULL);
    fclose(f);
    return strrchr(line, ')')[2] == 'S';
}

static struct peer *peers_start(struct scene *s, uint32_t died, uint32_t slot, uint32_t n)
{
    struct peer *p =
        mmap(NULL, n * sizeof *p, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    CHECK(p != MAP_FAILED);
    for (uint32_t i = 0; i < n; i++) {
        pid_t pid = fork();
        CHECK(pid >= 0);
        if (pid == 0)
            be_peer(s, died, slot, &p[i]);
        p[i].pid = pid;
    }
    for (uint32_t i = 0; i < n; i++)
        while (atomic_load(&p[i].tries) == 0 || !sleeps(p[i].pid))
            sh_os_nap(100000);
    return p;
}

/* Nanoseconds until the first had the lock; 0: one never had it. */
static uint64_t peers_end(struct peer *p, uint32_t n, uint64_t died_ns)
{
    uint64_t first = UINT64_MAX;
    for (uint32_t i = 0; i < n; i++) {
        int status;
        CHECK(waitpid(p[i].pid, &status, 0) == p[i].pid);
        uint64_t at = atomic_load(&p[i].has_it_ns);
        if (!WIFEXITED(status) || WEXITSTATUS(status) != 0)
            first = 0;
        else if (at - died_ns < first)
            first = at - died_ns;
    }
    munmap(p, n * sizeof *p);
    return first;
}

/* What a real death leaves must be what the copy has: it proves that copies tell the truth. */
static bool is_like_copy(struct scene *s, struct view *v, struct victim *victim)
{
    struct view copy, real;
    int fd = view_copy(v);
    view_open(&copy, fd, false);
    victim_kill(victim);
    view_open(&real, s->fd, false);
    uint64_t differ = view_differs(&copy, &real);
    if (differ != 0)
        snprintf(failure, sizeof failure, "%llu pages are not what the copy has",
                 (unsigned long long)differ);
    view_close(&copy);
    view_close(&real);
    close(fd);
    return differ == 0;
}

static bool kill_with_peers(struct row *r, struct scene *s, struct victim *victim, uint32_t died,
                            uint32_t slot)
{
    enum kind kind = died != 0 ? MUTEX : PROCESS_LOCK;
    uint32_t n = kind == MUTEX ? PEERS : 1; /* a process lock has one other taker */
    struct peer *p = peers_start(s, died, slot, n);
    ahead_of_others(victim->pid);
    uint64_t now = sh_os_now_ns();
    victim_kill(victim);
    uint64_t ns = peers_end(p, n, now);
    if (ns == 0)
        snprintf(failure, sizeof failure, "a peer did not get the lock");
    else if (r->nwaits[kind] < 256)
        r->waits[kind][r->nwaits[kind]++] = ns;
    return ns != 0;
}

static void kill_for_real(struct row *r, uint64_t at, bool with_peers)
{
    struct scene s;
    struct view v, after;
    struct victim victim;
    run_to(r, at, &s, &v, &victim);
    uint32_t slot = slot_locked(&s, &victim);
    bool ok, locked = v.died != 0 || slot != SH_NIL;
    if (with_peers && locked) {
        ok = kill_with_peers(r, &s, &victim, v.died, slot);
    } else {
        ok = is_like_copy(&s, &v, &victim);
        r->same += ok;
    }
    view_open(&after, s.fd, false);
    ok = ok && survives(&s, &after, true);
    r->real.tried++;
    r->real.states += with_peers && locked;
    r->real.survived += ok;
    if (!ok)
        say_failure(r, "real", at, 0);
    view_close(&v);
    view_close(&after);
    scene_end(&s);
}

/* Output */

static void print_waits(const char *name, const uint64_t *ns, uint64_t n)
{
    printf(", \"%s\": [", name);
    for (uint64_t i = 0; i < n; i++)
        printf("%s%llu", i ? ", " : "", (unsigned long long)ns[i]);
    printf("]");
}

static void print_row(const struct row *r)
{
    printf("{\"operation\": \"%s\", \"stage\": \"%s\", \"instructions\": %llu", r->op->name,
           stage_names[r->stage], (unsigned long long)r->instructions);
    printf(", \"tried\": %llu, \"states\": %llu, \"survived\": %llu",
           (unsigned long long)r->single.tried, (unsigned long long)r->single.states,
           (unsigned long long)r->single.survived);
    printf(", \"double_tried\": %llu, \"double_survived\": %llu",
           (unsigned long long)r->twice.tried, (unsigned long long)r->twice.survived);
    printf(", \"kills_tried\": %llu, \"kills_survived\": %llu, \"kills_like_copy\": %llu",
           (unsigned long long)r->real.tried, (unsigned long long)r->real.survived,
           (unsigned long long)r->same);
    print_waits("mutex_ns", r->waits[MUTEX], r->nwaits[MUTEX]);
    print_waits("process_lock_ns", r->waits[PROCESS_LOCK], r->nwaits[PROCESS_LOCK]);
    printf("}\n");
}

static int list_ops(void)
{
    for (size_t i = 0; i < nops; i++)
        for (uint32_t stage = 0; stage < NSTAGES; stage++)
            printf("%s %u\n", ops[i].name, stage);
    return 0;
}

static const struct op *find_op(const char *name)
{
    for (size_t i = 0; i < nops; i++)
        if (strcmp(ops[i].name, name) == 0)
            return &ops[i];
    fprintf(stderr, "there is no operation %s\n", name);
    exit(2);
}

/* A step is two switches between processes: cheaper when they need not wake another CPU. */
static void stay_on_this_cpu(void)
{
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET((size_t)sched_getcpu(), &one);
    sched_setaffinity(0, sizeof one, &one);
}

int main(int argc, char **argv)
{
    if (argc == 2 && strcmp(argv[1], "--list") == 0)
        return list_ops();
    if (argc != 9)
        return 2;
    struct row r = {.op = find_op(argv[1])};
    uint64_t n[7];
    for (int i = 0; i < 7; i++)
        n[i] = strtoull(argv[2 + i], NULL, 10);
    r.stage = (enum stage)n[0];
    r.share = n[1];
    r.of = n[2];
    r.rng.state = 0x9e3779b97f4a7c15ull * (n[3] + 1);
    r.doubles = n[4];
    r.kills = n[5];
    r.stop = n[6] != 0;
    stay_on_this_cpu();
    die_at_each(&r);
    for (uint64_t i = 0; i < r.doubles && !(r.stop && failed(&r)); i++)
        die_twice_at(&r, moment(&r, MUTEX));
    for (uint64_t i = 0; i < r.kills && !(r.stop && failed(&r)); i++)
        kill_for_real(&r,
                      i % 3 == 0 ? rng_below(&r.rng, (uint32_t)r.instructions)
                                 : moment(&r, i % 3 == 1 ? MUTEX : PROCESS_LOCK),
                      i % 3 != 0);
    print_row(&r);
    return failed(&r);
}
