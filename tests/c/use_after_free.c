/*
 * Use after free: readers pin and read what writers free and allocate anew all the time, a
 * coordinator collects and punches what is idle, and all of them are killed, readers most.
 *
 *     use_after_free PINS SEED
 *
 * Every word of a block is a function of its offset and generation, and never 0. A reader that is
 * let in by a handle whose block is gone sees the words of the block that lies there now, or the
 * zeros of a punched page. Handles are given out by a board that everybody may read: the writer
 * neither tells readers that a block goes, nor waits for them.
 *
 * Ends when so many pins were checked, or at a wrong byte. Prints one JSON object. Exit
 * status: 0, 1 where a byte was wrong, and an abort where anything else was. Built and run by
 * tools/use_after_free.py; see docs/reference/use-after-free.md.
 */
#include "support.h"

#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#define READERS     2u
#define WRITERS     1u
#define COORDINATOR (READERS + WRITERS) /* the last child */
#define CHILDREN    (COORDINATOR + 1)
#define CELLS       1024u
#define HELD        16u /* pins that a reader keeps for a while */
#define BATCH       128u
#define CAPACITY    (1ull << 30)
#define LIMIT_S     3600

/* Steps in a life, at most: each is killed after a random number of them. */
#define READER_LIFE      100000u
#define WRITER_LIFE      400000u
#define COORDINATOR_LIFE 100u

/* What a reader is doing, for whoever kills it */
enum doing {
    NOTHING,
    PINNING,
    READING,
    DROPPING,
    NDOING
};

/* What a child has done: its own line, added to by it and those who had the seat before. */
struct seat {
    _Alignas(SH_LINE) _Atomic uint64_t steps; /* of this life */
    _Atomic uint32_t doing;
    _Atomic uint64_t pins, stale, renewed, punched;
};

struct stage {
    _Atomic uint64_t board[CELLS]; /* handles, 0 = none; W: the cell's writer */
    struct seat seat[CHILDREN];
    _Alignas(SH_LINE) _Atomic uint64_t wrong_bytes;
    _Atomic uint32_t stop;
};

struct child {
    pid_t pid;
    uint64_t life;
};

struct theatre {
    struct stage *stage;
    pid_t pid;
    int fd;
    struct rng rng;
    struct child child[CHILDREN];
    uint64_t pins, kills, killed_while[NDOING];
};

/* Handles: present:1 offset/16:26 generation:37 */

static uint64_t pack(uint64_t off, uint64_t gen)
{
    return 1ull << 63 | off >> 4 << SH_GEN_BITS | gen;
}

static struct handle unpack(uint64_t packed)
{
    return (struct handle){(packed & ~(1ull << 63)) >> SH_GEN_BITS << 4, SH_GEN(packed), 0, 0};
}

/* What a block with this handle is full of: an odd factor keeps unlike handles unlike. */
static uint64_t word_of(uint64_t packed)
{
    return packed * 0x9e3779b97f4a7c15ull | 1;
}

/* Many blocks to an OS page, one, and many pages to a block. */
static uint64_t bytes_of(uint32_t cell)
{
    return cell % 64 == 0 ? 80000 : cell % 16 == 0 ? 4096 : cell % 4 == 0 ? 512 : 64;
}

static void done(_Atomic uint64_t *count)
{
    sh_bump(count, 1);
}

/* Writers */

static void publish(struct stage *s, uint32_t cell, uint64_t packed)
{
    atomic_store_explicit(&s->board[cell], packed, REL);
}

/* Full: of what the dead have, until the coordinator, which may be dead too, has its turn. */
static struct sh_ref make(struct sh_ctx *c, uint32_t cell, uint64_t *packed)
{
    struct sh_ref r;
    enum sh_status status;
    while ((status = sh_alloc(c, bytes_of(cell), false, 10000, &r)) == SH_BUSY || status == SH_FULL)
        sh_os_nap(100000);
    CHECK_OK(status);
    *packed = pack(sh_data_offset(c, &r), r.gen);
    for (uint64_t i = 0; i < r.nbytes / 8; i++)
        ((uint64_t *)r.data)[i] = word_of(*packed);
    return r;
}

static void drop(struct sh_ctx *c, struct sh_ref *r)
{
    if (r->nbytes != 0)
        block_drop(c, r);
    r->nbytes = 0;
}

/* The next block may lie where this one did, if that goes first. */
static void renew(struct stage *s, struct sh_ctx *c, struct sh_ref *mine, uint32_t cell, bool first)
{
    uint64_t packed;
    struct sh_ref before = *mine;
    if (first)
        drop(c, &before);
    *mine = make(c, cell, &packed);
    publish(s, cell, packed);
    drop(c, &before);
}

/* Blocks that lie together go together, so that whole pages are idle; readers still have the
 * handles. */
static void drop_batch(struct sh_ctx *c, struct sh_ref *mine, uint32_t from)
{
    for (uint32_t i = from; i < from + BATCH && i < CELLS; i++)
        drop(c, &mine[i]);
}

static void be_writer(struct stage *s, struct seat *seat, struct sh_ctx *c, struct rng *rng)
{
    static struct sh_ref mine[CELLS];
    uint32_t which = (uint32_t)(seat - s->seat) - READERS;
    while (atomic_load(&s->stop) == 0) {
        uint32_t cell = rng_below(rng, CELLS / WRITERS) * WRITERS + which;
        if (rng_below(rng, 512) == 0) {
            drop_batch(c, mine, cell);
        } else {
            renew(s, c, &mine[cell], cell, rng_below(rng, 2));
            done(&seat->renewed);
        }
        done(&seat->steps);
    }
    for (uint32_t i = 0; i < CELLS; i++)
        drop(c, &mine[i]);
}

/* Readers */

struct held {
    struct sh_ref r;
    uint64_t packed;
    uint32_t cell;
};

static void found_wrong(struct stage *s, const struct held *h, uint64_t wrong, uint64_t at)
{
    struct handle of = unpack(h->packed);
    if (atomic_fetch_add(&s->wrong_bytes, wrong) != 0)
        return;
    fprintf(stderr, "%llu wrong bytes in the block at %llu, generation %llu, from byte %llu on\n",
            (unsigned long long)wrong, (unsigned long long)of.off, (unsigned long long)of.gen,
            (unsigned long long)at);
}

static void check(struct stage *s, const struct held *h)
{
    const uint64_t *words = (const uint64_t *)h->r.data, want = word_of(h->packed);
    uint64_t n = bytes_of(h->cell) / 8, unlike = 0, wrong = 0, first = 0;
    if (h->r.nbytes != n * 8)
        found_wrong(s, h, n * 8, 0); /* another block's size: none of it is what was asked for */
    for (uint64_t i = 0; i < n; i++)
        unlike |= words[i] ^ want;
    for (uint64_t i = n * 8; unlike != 0 && i-- > 0;) {
        if (h->r.data[i] == (uint8_t)(want >> i % 8 * 8))
            continue;
        wrong++;
        first = i;
    }
    if (unlike != 0)
        found_wrong(s, h, wrong, first);
}

static void doing(struct seat *seat, enum doing what)
{
    atomic_store_explicit(&seat->doing, what, RLX);
}

static void unpin(struct seat *seat, struct sh_ctx *c, struct held *h)
{
    doing(seat, DROPPING);
    drop(c, &h->r);
    doing(seat, NOTHING);
}

static void pin(struct seat *seat, struct sh_ctx *c, struct held *h)
{
    struct handle of = unpack(h->packed);
    doing(seat, PINNING);
    enum sh_status status = handle_open(c, &of, &h->r);
    CHECK(status == SH_OK || status == SH_STALE || status == SH_FULL); /* no room for pins */
    if (status == SH_OK) {
        done(&seat->pins);
        doing(seat, READING);
    } else {
        h->r.nbytes = 0;
        sh_bump(&seat->stale, status == SH_STALE);
        doing(seat, NOTHING);
    }
}

/* Now and then one that is kept, and read again when another one takes its place. */
static void keep(struct stage *s, struct seat *seat, struct sh_ctx *c, struct held *h,
                 struct held *hand)
{
    struct held before = *hand;
    *hand = *h;
    *h = before;
    if (h->r.nbytes != 0)
        check(s, h);
    unpin(seat, c, h);
}

static void be_reader(struct stage *s, struct seat *seat, struct sh_ctx *c, struct rng *rng)
{
    static uint64_t seen[CELLS]; /* what was on the board when we last looked */
    struct held hands[HELD] = {0};
    while (atomic_load(&s->stop) == 0) {
        struct held h = {.cell = rng_below(rng, CELLS)};
        uint64_t now = atomic_load_explicit(&s->board[h.cell], ACQ);
        h.packed = rng_below(rng, 16) ? now : seen[h.cell];
        seen[h.cell] = now;
        if (h.packed == 0)
            continue;
        pin(seat, c, &h);
        if (h.r.nbytes != 0) {
            check(s, &h);
            if (rng_below(rng, 16) == 0)
                keep(s, seat, c, &h, &hands[rng_below(rng, HELD)]);
            else
                unpin(seat, c, &h);
        }
        done(&seat->steps);
    }
    for (uint32_t i = 0; i < HELD; i++)
        drop(c, &hands[i].r);
}

/* Takes over, and does everything that a coordinator does, for ever. */
static void be_coordinator(struct stage *s, struct seat *seat, int fd)
{
    struct sh_ctx lead;
    arena_lead(&lead, fd);
    while (atomic_load(&s->stop) == 0) {
        uint64_t bytes, runs;
        uint32_t page = 0;
        reap_dead(&lead, UINT64_MAX);
        collect(&lead);
        do {
            CHECK_OK(sh_release(&lead, SH_STAMP_MAX, 1 << 20, &page, &bytes, &runs));
            sh_bump(&seat->punched, bytes);
        } while (page != 0);
        done(&seat->steps);
        sh_os_nap(2000000); /* the readers' turn */
    }
    arena_leave(&lead);
}

/* The parent */

static void be(struct theatre *t, uint32_t i, uint64_t life)
{
    struct seat *seat = &t->stage->seat[i];
    struct rng rng = {t->rng.state ^ life << 32};
    struct sh_ctx c;
    CHECK(prctl(PR_SET_PDEATHSIG, SIGKILL) == 0);
    if (getppid() != t->pid) /* it had died before */
        return;
    if (i == COORDINATOR) {
        be_coordinator(t->stage, seat, t->fd);
        return;
    }
    arena_join(&c, t->fd);
    if (i < READERS)
        be_reader(t->stage, seat, &c, &rng);
    else
        be_writer(t->stage, seat, &c, &rng);
    arena_leave(&c);
}

static void start(struct theatre *t, uint32_t i)
{
    uint32_t most = i < READERS ? READER_LIFE : i == COORDINATOR ? COORDINATOR_LIFE : WRITER_LIFE;
    t->child[i].life = 1 + rng_below(&t->rng, most);
    atomic_store(&t->stage->seat[i].steps, 0);
    fflush(NULL);
    t->child[i].pid = fork();
    CHECK(t->child[i].pid >= 0);
    if (t->child[i].pid != 0)
        return;
    be(t, i, t->child[i].life);
    _exit(0);
}

static void kill_one(struct theatre *t, uint32_t i)
{
    int status;
    CHECK(kill(t->child[i].pid, SIGKILL) == 0);
    CHECK(waitpid(t->child[i].pid, &status, 0) == t->child[i].pid);
    CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
    if (i < READERS)
        t->killed_while[atomic_load(&t->stage->seat[i].doing)]++;
    t->kills++;
}

/* Until so many pins were checked, and each had its turn: somebody died, and pages were punched. */
static bool goes_on(struct theatre *t, uint64_t pins)
{
    int status;
    t->pins = 0;
    for (uint32_t i = 0; i < READERS; i++)
        t->pins += atomic_load(&t->stage->seat[i].pins);
    bool punched = atomic_load(&t->stage->seat[COORDINATOR].punched) != 0;
    if ((t->pins >= pins && t->kills != 0 && punched) || atomic_load(&t->stage->wrong_bytes) != 0)
        return false;
    for (uint32_t i = 0; i < CHILDREN; i++) /* none ends by itself */
        CHECK(waitpid(t->child[i].pid, &status, WNOHANG) == 0);
    return true;
}

static void play(struct theatre *t, uint64_t pins)
{
    for (uint32_t i = 0; i < CHILDREN; i++)
        start(t, i);
    while (goes_on(t, pins)) {
        for (uint32_t i = 0; i < CHILDREN; i++) {
            if (atomic_load(&t->stage->seat[i].steps) < t->child[i].life)
                continue;
            kill_one(t, i);
            start(t, i);
        }
        sh_os_nap(50000);
    }
}

/* Everything was given back, by whoever lived to the end and by the reaper. */
static void end_well(struct theatre *t)
{
    struct sh_ctx lead;
    atomic_store(&t->stage->stop, 1);
    for (uint32_t i = 0; i < CHILDREN; i++) {
        int status;
        CHECK(waitpid(t->child[i].pid, &status, 0) == t->child[i].pid);
        CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    }
    arena_lead(&lead, t->fd);
    nothing_must_be_left(&lead);
    arena_leave(&lead);
}

/* Where bytes were wrong, counts are, too: nobody can be asked to leave in order. */
static void end_badly(struct theatre *t)
{
    for (uint32_t i = 0; i < CHILDREN; i++) {
        kill(t->child[i].pid, SIGKILL);
        waitpid(t->child[i].pid, NULL, 0);
    }
}

static uint64_t cycles(struct theatre *t)
{
    struct sh_ctx c;
    CHECK_OK(sh_map(&c, dup(t->fd), false));
    uint64_t n = atomic_load(&c.hdr->num_gc);
    sh_unmap(&c);
    return n;
}

static void say(struct theatre *t, uint64_t ns)
{
    struct seat sum = {0};
    for (uint32_t i = 0; i < CHILDREN; i++) {
        sh_bump(&sum.stale, t->stage->seat[i].stale);
        sh_bump(&sum.renewed, t->stage->seat[i].renewed);
        sh_bump(&sum.punched, t->stage->seat[i].punched);
    }
    const struct {
        const char *name;
        uint64_t value;
    } counts[] = {
        {"pins", t->pins},
        {"stale", sum.stale},
        {"wrong_bytes", t->stage->wrong_bytes},
        {"kills", t->kills},
        {"killed_pinning", t->killed_while[PINNING]},
        {"killed_reading", t->killed_while[READING]},
        {"killed_dropping", t->killed_while[DROPPING]},
        {"renewed", sum.renewed},
        {"cycles", cycles(t)},
        {"punched_bytes", sum.punched},
    };
    for (size_t i = 0; i < sizeof counts / sizeof counts[0]; i++)
        printf("%s\"%s\": %llu", i ? ", " : "{", counts[i].name,
               (unsigned long long)counts[i].value);
    printf(", \"seconds\": %.3f}\n", (double)ns / 1e9);
}

int main(int argc, char **argv)
{
    if (argc != 3) {
        fprintf(stderr, "usage: use_after_free PINS SEED\n");
        return 2;
    }
    struct theatre t = {.pid = getpid(), .fd = arena_new(CAPACITY, NO_LIMIT)};
    t.rng.state = 0x9e3779b97f4a7c15ull * (1 + strtoull(argv[2], NULL, 10));
    t.stage =
        mmap(NULL, sizeof *t.stage, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    CHECK(t.stage != MAP_FAILED);
    alarm(LIMIT_S);
    uint64_t from = sh_os_now_ns();
    play(&t, strtoull(argv[1], NULL, 10));
    bool wrong = atomic_load(&t.stage->wrong_bytes) != 0;
    (wrong ? end_badly : end_well)(&t);
    say(&t, sh_os_now_ns() - from);
    return wrong;
}
