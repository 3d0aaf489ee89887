/*
 * A process that is stepped by ptrace, and its arena at each step.
 *
 * What a death leaves is the arena's bytes, with one change that the kernel makes: it walks the
 * thread's list of robust mutexes and marks those that are locked. Both are done here for a copy of
 * the arena, so that one run of an operation yields as many deaths as it has instructions. That the
 * copy is what a real death leaves is proven by real deaths (main.c: kill_for_real).
 */
#include "killpoints.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <signal.h>
#include <stddef.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <unistd.h>

#define OS_PAGE   4096u
#define MAX_STEPS 5000000u /* more is a loop without end */

/* The arena as it is now */

static uint64_t pages_held(int fd, uint64_t page, uint64_t n)
{
    struct {
        uint64_t off, len;
    } range = {page * OS_PAGE, n * OS_PAGE};
    struct {
        uint64_t cache, dirty, writeback, evicted, recently_evicted;
    } stat = {0};
    CHECK(syscall(451, fd, &range, &stat, 0) == 0); /* cachestat: Linux 6.5 */
    return stat.cache;
}

/* Which pages the kernel holds, also those never written to. `n` of the range are known to be. */
static void find_held(struct view *v, uint64_t page, uint64_t n, uint64_t held)
{
    if (held == 0 || held == n) {
        memset(v->held + page, held != 0, n);
        return;
    }
    uint64_t left = pages_held(v->fd, page, n / 2);
    find_held(v, page, n / 2, left);
    find_held(v, page + n / 2, n - n / 2, held - left);
}

void view_open(struct view *v, int fd, bool at_each)
{
    struct stat st;
    memset(v, 0, sizeof *v);
    CHECK(fstat(fd, &st) == 0);
    v->fd = fd;
    v->at_each = at_each;
    v->npages = (uint64_t)st.st_size / OS_PAGE;
    v->base = sh_os_map(fd, v->npages * OS_PAGE, true);
    v->last = sh_os_private(v->npages * OS_PAGE);
    v->held = calloc(v->npages, sizeof *v->held);
    CHECK(v->base != NULL && v->last != NULL && v->held != NULL);
    view_look(v, 0);
}

void view_close(struct view *v)
{
    sh_os_unmap((void *)(uintptr_t)v->base, v->npages * OS_PAGE);
    sh_os_unmap(v->last, v->npages * OS_PAGE);
    free(v->held);
}

bool view_look(struct view *v, uint32_t died)
{
    uint64_t now = pages_held(v->fd, 0, v->npages);
    bool is_new = now != v->nheld || died != v->died;
    if (is_new || !v->at_each) /* one instruction commits or releases, never both */
        find_held(v, 0, v->npages, now);
    v->nheld = now;
    v->died = died;
    for (uint64_t p = 0; p < v->npages; p++) {
        const uint64_t at = p * OS_PAGE;
        if (!v->held[p] || memcmp(v->last + at, v->base + at, OS_PAGE) == 0)
            continue;
        memcpy(v->last + at, v->base + at, OS_PAGE);
        is_new = true;
    }
    return is_new;
}

struct sh_header *view_header(const struct view *v)
{
    return (struct sh_header *)v->last;
}

static struct sh_lock *mutex_of(struct sh_header *h, uint32_t i)
{
    struct sh_lock *const locks[NMUTEXES] = {&h->registry, &h->roots, &h->heap};
    return locks[i];
}

static uint64_t word_of_mutex(const struct view *v, uint32_t i)
{
    const pthread_mutex_t *m = &mutex_of(view_header(v), i)->mutex;
    return (uint64_t)((const uint8_t *)&m->__data.__lock - v->last);
}

/* What handle_futex_death() of the kernel writes: the owner is gone, that there are waiters stays.
 */
static void mark_mutex(int fd, uint64_t off)
{
    uint32_t word;
    CHECK(pread(fd, &word, sizeof word, (off_t)off) == sizeof word);
    word = (word & FUTEX_WAITERS) | FUTEX_OWNER_DIED;
    CHECK(pwrite(fd, &word, sizeof word, (off_t)off) == sizeof word);
}

int view_copy(const struct view *v)
{
    int fd = (int)syscall(SYS_memfd_create, "copy", 1u /* MFD_CLOEXEC */);
    CHECK(fd >= 0 && ftruncate(fd, (off_t)(v->npages * OS_PAGE)) == 0);
    for (uint64_t p = 0, n; p < v->npages; p += n) {
        for (n = 1; p + n < v->npages && v->held[p + n] == v->held[p];)
            n++;
        ssize_t bytes = (ssize_t)(n * OS_PAGE);
        if (v->held[p])
            CHECK(pwrite(fd, v->last + p * OS_PAGE, (size_t)bytes, (off_t)(p * OS_PAGE)) == bytes);
    }
    for (uint32_t i = 0; i < NMUTEXES; i++)
        if (v->died >> i & 1)
            mark_mutex(fd, word_of_mutex(v, i));
    return fd;
}

uint64_t view_differs(const struct view *a, const struct view *b)
{
    uint64_t n = 0;
    for (uint64_t p = 0; p < a->npages; p++)
        n += a->held[p] != b->held[p] ||
             (a->held[p] && memcmp(a->last + p * OS_PAGE, b->last + p * OS_PAGE, OS_PAGE) != 0);
    return n;
}

/* The victim */

__attribute__((noinline)) static void op_begins(void)
{
    __asm__ volatile("");
}
__attribute__((noinline)) static void op_is_over(void)
{
    __asm__ volatile("nop");
}

_Noreturn static void be_victim(struct victim *v, struct scene *s, void (*act)(struct scene *))
{
    CHECK(prctl(PR_SET_PDEATHSIG, SIGKILL) == 0);
    if (act == s->op->act) {
        struct sh_ctx *c = &s->victim;
        CHECK_OK(sh_map(c, dup(s->fd), true));
        v->shared->base = (uint64_t)(uintptr_t)c->base;
        if (!(s->op->flags & COMES))
            CHECK_OK(s->op->flags & LEADS ? sh_attach_coordinator(c, 1000) : sh_attach(c, 1000));
        if (s->op->ready != NULL)
            s->op->ready(s);
        v->shared->owner = c->slot == NULL ? 0 : c->owner;
    } else {
        CHECK_OK(sh_map(&s->victim, dup(s->fd), true));
        v->shared->base = (uint64_t)(uintptr_t)s->victim.base;
    }
    CHECK(ptrace(PTRACE_TRACEME, 0, NULL, NULL) == 0);
    raise(SIGSTOP);
    op_begins();
    act(s);
    op_is_over();
    _exit(0);
}

static uint64_t place(const struct victim *v)
{
    errno = 0;
    long at = ptrace(PTRACE_PEEKUSER, v->pid, offsetof(struct user, regs.rip), NULL);
    CHECK(errno == 0);
    return (uint64_t)at;
}

static bool step(struct victim *v)
{
    int status;
    CHECK(ptrace(PTRACE_SINGLESTEP, v->pid, NULL, NULL) == 0);
    CHECK(waitpid(v->pid, &status, 0) == v->pid);
    return WIFSTOPPED(status) && WSTOPSIG(status) == SIGTRAP;
}

/* A child of this process runs `act`; on return it is about to, and stopped. */
void victim_start(struct victim *v, struct scene *s, void (*act)(struct scene *))
{
    int status;
    memset(v, 0, sizeof *v);
    v->shared =
        mmap(NULL, sizeof *v->shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    CHECK(v->shared != MAP_FAILED);
    v->pid = fork();
    CHECK(v->pid >= 0);
    if (v->pid == 0)
        be_victim(v, s, act);
    CHECK(waitpid(v->pid, &status, 0) == v->pid);
    CHECK(WIFSTOPPED(status) && WSTOPSIG(status) == SIGSTOP);
    while (place(v) != (uint64_t)(uintptr_t)op_begins)
        CHECK(step(v));
}

bool victim_step(struct victim *v)
{
    CHECK(++v->instructions < MAX_STEPS);
    CHECK(step(v) && "the operation failed");
    v->at_end = place(v) == (uint64_t)(uintptr_t)op_is_over;
    return !v->at_end;
}

static uint64_t word_at(const struct victim *v, uint64_t at)
{
    uint64_t word;
    struct iovec here = {&word, sizeof word}, there = {(void *)(uintptr_t)at, sizeof word};
    CHECK(process_vm_readv(v->pid, &here, 1, &there, 1, 0) == sizeof word);
    return word;
}

/* One entry of the thread's list; its lowest bit says "priority inheriting". */
static uint32_t mutex_at(const struct victim *v, const struct view *a, uint64_t entry,
                         uint64_t to_word)
{
    uint64_t off = (entry & ~1ull) + to_word - v->shared->base;
    for (uint32_t i = 0; i < NMUTEXES; i++)
        if (entry != 0 && off == word_of_mutex(a, i) &&
            (*(const uint32_t *)(a->base + off) & FUTEX_TID_MASK) == (uint32_t)v->pid)
            return 1u << i;
    return 0;
}

/* The mutexes that the kernel would mark, a bit each: those in the list, and the one that is being
 * locked or unlocked at this moment. As exit_robust_list() of the kernel has it. */
uint32_t victim_mutexes(const struct victim *v, const struct view *a)
{
    uint64_t head, bytes, n = 0;
    CHECK(syscall(SYS_get_robust_list, v->pid, &head, &bytes) == 0);
    uint64_t to_word = word_at(v, head + offsetof(struct robust_list_head, futex_offset));
    uint64_t pending = word_at(v, head + offsetof(struct robust_list_head, list_op_pending));
    uint32_t died = mutex_at(v, a, pending, to_word);
    for (uint64_t entry = word_at(v, head); entry != head && n < 8; n++) {
        died |= mutex_at(v, a, entry, to_word);
        entry = word_at(v, entry & ~1ull);
    }
    return died;
}

void victim_kill(struct victim *v)
{
    int status;
    if (v->pid != 0) {
        CHECK(kill(v->pid, SIGKILL) == 0);
        do
            CHECK(waitpid(v->pid, &status, 0) == v->pid);
        while (!WIFSIGNALED(status) && !WIFEXITED(status));
    }
    v->pid = 0;
    if (v->shared != NULL)
        munmap(v->shared, sizeof *v->shared);
    v->shared = NULL;
}
