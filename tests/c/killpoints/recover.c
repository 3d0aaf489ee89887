/*
 * What survivors do after a death, in a process of its own and in a copy of the arena.
 *
 * The process is forked from the one that plays the survivors, so it has their private state as it
 * was at the death: their contexts, bitmaps, handles. The copy is mapped where the arena was; from
 * there on they are the survivors. Whatever fails, crashes or hangs here is one death not survived.
 */
#include "killpoints.h"

#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#define GUARD_S 20 /* a recovery that hangs has failed */

char failure[512];

static void must_be_without_violations(struct sh_ctx *c)
{
    uint32_t violations = 0;
    CHECK_OK(sh_check(c, test_say, &violations));
    CHECK(violations == 0);
}

static void take_each_lock(struct sh_ctx *c)
{
    CHECK_OK(sh_registry(c, 1000));
    sh_unlock(c, &c->hdr->registry);
    CHECK_OK(sh_lock(c, &c->hdr->roots, 1000)); /* not SH_CHANGED: no log is ever bad */
    sh_unlock(c, &c->hdr->roots);
    CHECK_OK(sh_lock(c, &c->hdr->heap, 1000));
    sh_unlock(c, &c->hdr->heap);
}

/* Goes on as if nothing had happened: small and large blocks, where there is room. */
static void work(struct sh_ctx *c)
{
    static const uint32_t sizes[] = {50, 700, 4000, 30000, 80000};
    struct sh_ref r[5];
    bool got[5];
    for (uint32_t i = 0; i < 5; i++) {
        enum sh_status status;
        while ((status = sh_alloc(c, sizes[i], true, 1000, &r[i])) == SH_BUSY) {
        }
        CHECK(status == SH_OK || status == SH_FULL);
        got[i] = status == SH_OK;
        if (!got[i])
            continue;
        block_must_be_whole(&r[i], 0);
        fill_block(&r[i], 200);
    }
    for (uint32_t i = 0; i < 5; i++) {
        if (got[i]) {
            block_must_be_whole(&r[i], 200);
            block_drop(c, &r[i]);
        }
    }
}

static void kept_must_be_whole(struct scene *s)
{
    for (uint32_t i = 0; i < s->nkept; i++)
        block_must_be_whole(&s->kept[i], (int)i + 1);
}

/* Each reference of a node names one whole block, the old or the new one, or none. */
static void must_be_whole(struct sh_ctx *c, const struct sh_ref *r)
{
    bool node = atomic_load(r->word) & SH_NODE;
    uint32_t n = node ? SH_NODE_NREFS(((struct sh_node *)r->data)->head) : 0;
    if (!node)
        block_must_be_whole(r, -1);
    for (uint32_t i = 0; i < n; i++) {
        struct sh_ref got;
        enum sh_status status = sh_node_load(c, r, i, 1000, &got);
        if (status == SH_ABSENT)
            continue;
        CHECK_OK(status);
        must_be_whole(c, &got);
        block_drop(c, &got);
    }
}

/* Each name likewise; then it stands for none. */
static void clear_roots(struct sh_ctx *c)
{
    char name[SH_ROOT_NAME_MAX];
    uint32_t entry = 0, len;
    while (sh_root_name(c, &entry, name, &len, 1000) == SH_OK) {
        struct sh_ref r;
        CHECK_OK(sh_root_get(c, name, len, 1000, &r));
        must_be_whole(c, &r);
        block_drop(c, &r);
        enum sh_status status = sh_root_clear(c, name, len, 1000);
        CHECK_OK(status == SH_DEFERRED ? sh_flush(c, 1000) : status);
        entry = 0;
    }
}

static void open_handle(struct scene *s, const struct handle *h)
{
    struct sh_ref r;
    CHECK_OK(handle_open(&s->witness, h, &r));
    block_must_be_whole(&r, -1);
    block_drop(&s->witness, &r);
}

static void drop_everything(struct scene *s)
{
    if (s->nkept != 0)
        open_handle(s, &s->leased);
    for (uint32_t i = 0; i < s->nkept; i++)
        block_drop(&s->witness, &s->kept[i]);
    clear_roots(&s->witness);
    coll_end(s);
    if (atomic_load(&s->witness.slot->waiting) != 0)
        sh_waiting(&s->witness, false);
    arena_leave(&s->witness);
}

/* As many leases as there are cells with one: the witness has one for sure. */
static void leases_must_be_counted(struct scene *s)
{
    struct sh_ref r;
    if (s->op->flags & TAKES_LEASE && handle_open(&s->witness, &s->taken, &r) == SH_OK) {
        block_must_be_whole(&r, -1);
        block_drop(&s->witness, &r);
    }
    CHECK(sh_leases(s->witness.slot) == (s->nkept != 0));
}

/* The cycle in which the last coordinator died goes on from SWEEP, or starts again (rule 13). */
static void take_over(struct sh_ctx *lead)
{
    uint32_t phase;
    CHECK_OK(sh_begin(lead, &phase));
    if (phase == SH_SWEEP)
        end_collection(lead);
    else if (phase != SH_IDLE)
        collect(lead);
}

static void clean_up(struct sh_ctx *lead)
{
    reap_dead(lead, UINT64_MAX);
    must_be_without_violations(lead);
    collect(lead);
    must_be_without_violations(lead);
    release_all(lead);
}

static void recover(struct scene *s, bool successor)
{
    struct sh_ctx *w = &s->witness, lead;
    atomic_store(&w->hdr->limit_units, NO_LIMIT >> w->geo.unit_shift);
    take_each_lock(w);
    must_be_without_violations(w);
    work(w); /* before any coordinator comes */
    must_be_without_violations(w);
    if (successor) /* else the dead one has been reaped before its lock is taken */
        coll_must_be_whole(s, false);
    CHECK_OK(sh_map(&lead, dup(w->fd), true));
    CHECK_OK(sh_attach_coordinator(&lead, 1000));
    if (successor)
        take_over(&lead);
    must_be_without_violations(&lead);
    clean_up(&lead);
    must_be_sound(&lead, EXACT_COUNTS); /* those that were too high are lowered */
    kernel_must_agree(&lead);
    kept_must_be_whole(s);
    leases_must_be_counted(s);
    coll_must_be_whole(s, true);
    work(w);
    kept_must_be_whole(s);
    drop_everything(s);
    nothing_must_be_left(&lead);
    CHECK(atomic_load(&lead.hdr->waiters) <= 1); /* on the high side: one death, or none */
}

/* The liveness lock of the witness's slot, on another file than the scene's (I-8). */
void *hold_witness(const struct scene *s, int fd)
{
    struct stat st;
    struct sh_ctx c = {.fd = fd, .geo = s->witness.geo};
    CHECK(fstat(fd, &st) == 0);
    c.dev = st.st_dev;
    c.ino = st.st_ino;
    void *held = sh_os_hold_byte(&c, sh_slot_byte(&c, s->witness.slot_index), false);
    CHECK(held != NULL);
    return held;
}

/* The witness goes on in this process and in the copy. */
static void move_to(struct scene *s, int fd)
{
    struct sh_ctx *w = &s->witness;
    struct stat st;
    CHECK(fstat(fd, &st) == 0 && dup2(fd, w->fd) == w->fd);
    CHECK(mmap(w->base, w->geo.end, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0) ==
          w->base);
    w->dev = st.st_dev;
    w->ino = st.st_ino;
    w->alive = hold_witness(s, fd);
    atomic_store(w->forked, 1); /* it was wiped */
}

static void read_failure(int fd, int status)
{
    ssize_t n = pread(fd, failure, sizeof failure - 1, 0);
    failure[n > 0 ? n : 0] = '\0';
    if (n <= 0)
        snprintf(failure, sizeof failure, "it ended with status %#x", (unsigned)status);
    for (char *at = failure; *at != '\0'; at++)
        if (*at == '\n' || *at == '"' || *at == '\\')
            *at = at[1] == '\0' ? '\0' : ' ';
}

/* Does everybody else go on if the victim dies at this moment? `successor`: the coordinator is a
 * new one, as it must be if the victim was the old one; else one that was there already. */
bool survives(struct scene *s, const struct view *v, bool successor)
{
    static int errors = -1;
    int status, fd = view_copy(v);
    if (errors < 0)
        errors = (int)syscall(SYS_memfd_create, "errors", 1u /* MFD_CLOEXEC */);
    CHECK(ftruncate(errors, 0) == 0 && lseek(errors, 0, SEEK_SET) == 0);
    fflush(NULL);
    pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) {
        alarm(GUARD_S);
        dup2(errors, 2);
        move_to(s, fd);
        recover(s, successor);
        _exit(0);
    }
    CHECK(waitpid(child, &status, 0) == child);
    close(fd);
    if (WIFEXITED(status) && WEXITSTATUS(status) == 0)
        return true;
    read_failure(errors, status);
    return false;
}

/* The recovery as an operation of its own: its deaths must be survived, too. */
void recover_alone(struct scene *s)
{
    struct sh_ctx *lead = &s->victim;
    take_each_lock(lead);
    CHECK_OK(sh_attach_coordinator(lead, 1000));
    take_over(lead);
    reap_dead(lead, UINT64_MAX);
    collect(lead);
    release_all(lead);
}
