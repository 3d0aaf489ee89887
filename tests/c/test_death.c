/*
 * Real deaths of real processes, at random moments and at every named crash point: whatever they
 * were in the middle of, the others go on, and at the end everything is given back (I-3, I-5, I-7,
 * I-8, I-9).
 */
#include "hammer.h"

#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#define CHILDREN 3
#define CAPACITY (48ull << 20)

static uint64_t kills_wanted = 100;

static void *shared_memory(size_t bytes)
{
    void *at = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    CHECK(at != MAP_FAILED);
    return at;
}

/* What parent and children have in common, beside the arena */
struct stage {
    struct mail mail;
    _Atomic uint64_t steps[CHILDREN + 1]; /* how far each is */
    _Atomic uint32_t stop;
};

struct child {
    pid_t pid;
    uint64_t target; /* steps after which it is killed */
    uint32_t id;     /* in the mail */
};

struct theatre {
    struct stage *stage;
    struct sh_ctx lead;
    int fd;
    struct rng rng;
    struct child child[CHILDREN + 1]; /* the last is a coordinator, if there is one */
    uint64_t kills;
};

/* Children */

static void be_user(struct theatre *t, uint32_t i)
{
    struct sh_ctx c;
    struct user u = {.c = &c, .mail = &t->stage->mail, .id = t->child[i].id};
    u.rng.state = test_seed() + t->child[i].id;
    arena_join(&c, t->fd);
    while (atomic_load(&t->stage->stop) == 0) {
        user_step(&u);
        atomic_fetch_add(&t->stage->steps[i], 1);
    }
    user_drop_all(&u);
    arena_leave(&c);
}

/* Takes over, and does everything that a coordinator does, for ever. */
static void be_coordinator(struct theatre *t)
{
    struct sh_ctx lead;
    _Atomic uint64_t *steps = &t->stage->steps[CHILDREN];
    arena_lead(&lead, t->fd);
    while (atomic_load(&t->stage->stop) == 0) {
        uint64_t bytes, runs;
        uint32_t page = 0;
        reap_dead(&lead, UINT64_MAX);
        collect(&lead);
        atomic_fetch_add(steps, 1);
        CHECK_OK(sh_release(&lead, SH_STAMP_MAX, 1 << 20, &page, &bytes, &runs));
        atomic_fetch_add(steps, 1);
    }
    arena_leave(&lead);
}

static void start(struct theatre *t, uint32_t i)
{
    static uint32_t last_id = 1;
    t->child[i].id = ++last_id;
    t->child[i].target = 1 + rng_below(&t->rng, i < CHILDREN ? 4000 : 12);
    atomic_store(&t->stage->steps[i], 0);
    fflush(NULL);
    t->child[i].pid = fork();
    CHECK(t->child[i].pid >= 0);
    if (t->child[i].pid != 0)
        return;
    alarm(120);
    if (i < CHILDREN)
        be_user(t, i);
    else
        be_coordinator(t);
    _exit(0);
}

/* The parent */

static int end_of(pid_t pid)
{
    int status;
    CHECK(waitpid(pid, &status, 0) == pid);
    return status;
}

/* Kills whoever is as far as its lot says; another takes its place. */
static void kill_some(struct theatre *t, uint32_t children)
{
    for (uint32_t i = 0; i < children; i++) {
        int status;
        CHECK(waitpid(t->child[i].pid, &status, WNOHANG) == 0); /* none ends by itself */
        if (atomic_load(&t->stage->steps[i]) < t->child[i].target)
            continue;
        CHECK(kill(t->child[i].pid, SIGKILL) == 0);
        status = end_of(t->child[i].pid);
        CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
        mail_forget(&t->stage->mail, t->child[i].id);
        t->kills++;
        start(t, i);
    }
}

static struct theatre *theatre_new(void)
{
    struct theatre *t = calloc(1, sizeof *t);
    t->stage = shared_memory(sizeof *t->stage);
    t->fd = arena_new(CAPACITY, NO_LIMIT);
    t->rng.state = test_seed();
    return t;
}

static void finish(struct theatre *t, uint32_t children)
{
    struct sh_ctx c;
    atomic_store(&t->stage->stop, 1);
    for (uint32_t i = 0; i < children; i++) {
        int status = end_of(t->child[i].pid);
        CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    }
    if (t->lead.hdr == NULL)
        arena_lead(&t->lead, t->fd);
    reap_dead(&t->lead, UINT64_MAX);
    must_be_sound(&t->lead, 0);
    arena_join(&c, t->fd);
    mail_end(&t->stage->mail, &c);
    arena_leave(&c);
    nothing_must_be_left(&t->lead);
    mail_say(&t->stage->mail, &t->lead, t->kills);
    arena_leave(&t->lead);
    close(t->fd);
    munmap(t->stage, sizeof *t->stage);
    free(t);
}

static void test_users_are_killed(void)
{
    struct theatre *t = theatre_new();
    arena_lead(&t->lead, t->fd);
    for (uint32_t i = 0; i < CHILDREN; i++)
        start(t, i);
    while (t->kills < test_scale(kills_wanted)) {
        uint64_t bytes, runs;
        uint32_t violations = 0;
        uint32_t page = 0;
        kill_some(t, CHILDREN);
        reap_dead(&t->lead, UINT64_MAX);
        collect(&t->lead);
        CHECK_OK(sh_release(&t->lead, SH_STAMP_MAX, 4 << 20, &page, &bytes, &runs));
        CHECK_OK(sh_check(&t->lead, test_say, &violations));
        CHECK(violations == 0);
    }
    finish(t, CHILDREN);
}

static void test_the_coordinator_is_killed(void)
{
    struct theatre *t = theatre_new();
    for (uint32_t i = 0; i <= CHILDREN; i++)
        start(t, i);
    while (t->kills < test_scale(kills_wanted))
        kill_some(t, CHILDREN + 1);
    finish(t, CHILDREN + 1);
}

/* Crash points. One process lives through it all with blocks of its own. */

struct scene {
    int fd;
    struct sh_ctx witness, lead;
    struct sh_ref kept[40];
    struct handle lease;
    const char *point;
    uint32_t nth;
};

/* Passes every point of a user. */
static void act_as_user(void *arg)
{
    struct scene *s = arg;
    struct sh_ctx c;
    struct sh_ref small[200], large;
    die_when(s->point, s->nth);
    arena_join(&c, s->fd);
    for (uint32_t i = 0; i < 200; i++)
        small[i] = block_new(&c, 50 + 30 * i);
    large = block_new(&c, 3000000);
    CHECK_OK(sh_root_set(&c, "large", 5, &large, 1000));
    CHECK_OK(sh_root_set(&c, "small", 5, &small[7], 1000));
    handle_lease(&c, &small[3]);
    for (uint32_t i = 0; i < 200; i++)
        block_drop(&c, &small[i]);
    block_drop(&c, &large);
    CHECK_OK(sh_fork_prepare(&c));
    sh_fork_parent(&c);
    CHECK_OK(sh_root_clear(&c, "large", 5, 1000));
    sh_flush(&c, 1000);
    CHECK(!sh_detach(&c, false) && "the witness is still there");
    arena_leave(&c);
}

/* Passes every point of a coordinator: there are dead to reap, garbage, holes and idle runs. */
static void act_as_coordinator(void *arg)
{
    struct scene *s = arg;
    struct sh_ctx lead;
    die_when(s->point, s->nth);
    arena_lead(&lead, s->fd);
    reap_dead(&lead, UINT64_MAX);
    collect(&lead);
    release_all(&lead);
    collect(&lead);
    arena_leave(&lead);
}

static void leave_a_mess(struct scene *s)
{
    struct sh_ctx c;
    struct sh_ref r[500];
    arena_join(&c, s->fd);
    for (uint32_t i = 0; i < 500; i++)
        r[i] = block_new(&c, 20 + i % 97 * 40);
    for (uint32_t i = 0; i < 500; i++)
        if (i % 16 != 0)
            block_drop(&c, &r[i]);
    CHECK_OK(sh_root_set(&c, "mess", 4, &r[16], 1000));
    handle_lease(&c, &r[32]);
    r[0] = block_new(&c, 2000000);
    block_drop(&c, &r[0]);
    arena_die(&c);
}

static void make_scene(struct scene *s)
{
    struct sh_ref gap[40];
    s->fd = arena_new(CAPACITY, NO_LIMIT);
    arena_join(&s->witness, s->fd);
    for (uint32_t i = 0; i < 40; i++) {
        s->kept[i] = block_new(&s->witness, 1000 + 700 * i);
        memset(s->kept[i].data, (uint8_t)(i + 1), s->kept[i].nbytes);
        gap[i] = block_new(&s->witness, 300 + i);
    }
    for (uint32_t i = 0; i < 40; i++)
        if (i % 10 != 0)
            block_drop(&s->witness, &gap[i]);
    leave_a_mess(s);
}

/* What the dead left is put in order by the next coordinator, and harms nobody who lives. */
static void clear_scene(struct scene *s)
{
    struct sh_ref r;
    arena_lead(&s->lead, s->fd);
    for (uint32_t i = 0; i < 40; i++) {
        r = block_new(&s->witness, 5000);
        block_drop(&s->witness, &r);
    }
    reap_dead(&s->lead, UINT64_MAX);
    collect(&s->lead);
    release_all(&s->lead);
    collect(&s->lead);
    must_be_sound(&s->lead, 0);
    kernel_must_agree(&s->lead);
    for (uint32_t i = 0; i < 40; i++) {
        for (uint64_t b = 0; b < s->kept[i].nbytes; b++)
            CHECK(s->kept[i].data[b] == (uint8_t)(i + 1));
        block_drop(&s->witness, &s->kept[i]);
    }
    static const char *const names[] = {"mess", "large", "small"};
    for (uint32_t i = 0; i < 3; i++) {
        enum sh_status status =
            sh_root_clear(&s->witness, names[i], (uint32_t)strlen(names[i]), 1000);
        CHECK(status == SH_OK || status == SH_ABSENT || status == SH_DEFERRED);
    }
    arena_leave(&s->witness);
    nothing_must_be_left(&s->lead);
    arena_leave(&s->lead);
    close(s->fd);
}

/* At its 1st, 2nd, 4th, ... passing, until there are no more. */
static uint32_t die_at_point(void (*act)(void *), const char *point)
{
    uint32_t deaths = 0;
    for (uint32_t nth = 1;; nth += 1 + nth / 2) {
        struct scene *s = calloc(1, sizeof *s);
        s->point = point;
        s->nth = nth;
        make_scene(s);
        bool survived = child_survives(act, s, NULL, 0);
        deaths += !survived;
        clear_scene(s);
        free(s);
        if (survived)
            return deaths;
    }
}

static void die_at_points(void (*act)(void *), const char *const *points)
{
    for (; *points != NULL; points++) {
        uint32_t deaths = die_at_point(act, *points);
        printf("   %s: %u deaths\n", *points, deaths);
        fflush(stdout);
        CHECK(deaths > 0); /* the point was passed */
    }
}

static void test_user_crash_points(void)
{
    static const char *const points[] = {"attach:held",
                                         "attach:registered",
                                         "cut:reserved",
                                         "commit:budgeted",
                                         "commit:step",
                                         "large:committed",
                                         "root:entered",
                                         "fork:reserved",
                                         "fork:prepared",
                                         "detach:judged",
                                         "detach:left",
                                         "log:entry",
                                         NULL};
    die_at_points(act_as_user, points);
}

static void test_coordinator_crash_points(void)
{
    static const char *const points[] = {
        "attach:registered", "orphan:held", "gc:phase",  "gc:marking", "gc:sweeping",
        "recount:begins",    "sum:counted", "reap:seen", "reap:cells", "release:claimed",
        "release:punched",   "log:entry",   NULL};
    die_at_points(act_as_coordinator, points);
}

static const char *predecessor_died_at;

/* Passes the points of finishing what another coordinator was in the middle of. */
static void act_as_successor(void *arg)
{
    struct scene *s = arg, first = *s;
    first.point = predecessor_died_at;
    first.nth = 1;
    CHECK(!child_survives(act_as_coordinator, &first, NULL, 0));
    act_as_coordinator(s);
}

static void test_successor_crash_points(void)
{
    static const char *const finishing[] = {"begin:claimed", NULL};
    static const char *const undoing[] = {"log:undo", NULL};
    predecessor_died_at = "release:claimed";
    die_at_points(act_as_successor, finishing);
    predecessor_died_at = "log:entry";
    die_at_points(act_as_successor, undoing);
}

/* The generation of a large block went with a coordinator that had taken a dead process's run and
 * died before it wrote the generation down: the next block there had the address and the generation
 * of a handle that was still about. */
static void test_a_run_taken_from_the_dead_keeps_its_generation(void)
{
    struct scene *s = calloc(1, sizeof *s);
    struct sh_ctx c;
    s->fd = arena_new(CAPACITY, NO_LIMIT);
    arena_join(&s->witness, s->fd);
    arena_join(&c, s->fd);
    struct sh_ref r = block_new(&c, 100000);
    struct handle stale = handle_of(&c, &r);
    CHECK_OK(sh_enter(&c, 1000));
    sh_pin_clear(&c, r.pin);
    uint64_t w = atomic_load(r.word);
    CHECK(sh_end_life(&c, &r, &w)); /* and dies before the run is its own */
    sh_leave(&c);
    arena_die(&c);
    s->point = "gc:judged";
    s->nth = 1;
    CHECK(!child_survives(act_as_coordinator, s, NULL, 0));
    arena_lead(&s->lead, s->fd);
    r = block_new(&s->witness, 100000);
    CHECK(sh_data_offset(&s->witness, &r) == stale.off && r.gen > stale.gen);
    block_drop(&s->witness, &r);
    arena_leave(&s->witness);
    nothing_must_be_left(&s->lead);
    arena_leave(&s->lead);
    close(s->fd);
    free(s);
}

static void wait_for_memory(void *arg)
{
    struct scene *s = arg;
    struct sh_ctx c;
    arena_join(&c, s->fd);
    die_when(s->point, s->nth);
    sh_waiting(&c, true);
    sh_waiting(&c, false);
}

/* The sum of waiters fell below 0 when one died between its own count and the sum, and whoever
 * waited next was not woken. */
static void test_a_waiter_that_dies_is_not_subtracted_twice(void)
{
    for (uint32_t nth = 1; nth <= 2; nth++) {
        struct scene *s = calloc(1, sizeof *s);
        s->point = "wait:counted";
        s->nth = nth;
        s->fd = arena_new(CAPACITY, NO_LIMIT);
        CHECK(!child_survives(wait_for_memory, s, NULL, 0));
        arena_lead(&s->lead, s->fd);
        arena_join(&s->witness, s->fd);
        reap_dead(&s->lead, UINT64_MAX);
        sh_waiting(&s->witness, true);
        uint32_t waiters = atomic_load(&s->lead.hdr->waiters);
        CHECK(waiters >= 1 && waiters <= 2); /* a death may leave it too high */
        sh_waiting(&s->witness, false);
        arena_leave(&s->witness);
        arena_leave(&s->lead);
        close(s->fd);
        free(s);
    }
}

static void take_lease(void *arg)
{
    struct scene *s = arg;
    struct sh_ctx c;
    struct sh_ref r;
    arena_join(&c, s->fd);
    die_when(s->point, 1);
    handle_open(&c, &s->lease, &r);
}

/* The count of leases of a process that lives stayed too high for ever when the taker of one died:
 * with it, a wait for memory that nobody can free was never refused. */
static void test_a_taker_that_dies_leaves_no_lease_on_the_books(void)
{
    struct scene *s = calloc(1, sizeof *s);
    s->fd = arena_new(CAPACITY, NO_LIMIT);
    arena_join(&s->witness, s->fd);
    struct sh_ref mine = block_new(&s->witness, 100), other = block_new(&s->witness, 100);
    s->lease = handle_lease(&s->witness, &mine);
    handle_lease(&s->witness, &other);
    s->point = "lease:taken";
    CHECK(!child_survives(take_lease, s, NULL, 0));
    arena_lead(&s->lead, s->fd);
    reap_dead(&s->lead, UINT64_MAX);
    collect(&s->lead);
    CHECK(sh_leases(s->witness.slot) == 1);
    arena_leave(&s->witness);
    nothing_must_be_left(&s->lead);
    arena_leave(&s->lead);
    close(s->fd);
    free(s);
}

int main(int argc, char **argv)
{
    static const struct test tests[] = {
        {"user_crash_points", test_user_crash_points},
        {"coordinator_crash_points", test_coordinator_crash_points},
        {"successor_crash_points", test_successor_crash_points},
        {"a_run_taken_from_the_dead_keeps_its_generation",
         test_a_run_taken_from_the_dead_keeps_its_generation},
        {"a_taker_that_dies_leaves_no_lease_on_the_books",
         test_a_taker_that_dies_leaves_no_lease_on_the_books},
        {"a_waiter_that_dies_is_not_subtracted_twice",
         test_a_waiter_that_dies_is_not_subtracted_twice},
        {"users_are_killed", test_users_are_killed},
        {"the_coordinator_is_killed", test_the_coordinator_is_killed},
    };
    if (argc > 1)
        kills_wanted = strtoull(argv[1], NULL, 10);
    return test_main("death", tests, sizeof tests / sizeof tests[0]);
}
