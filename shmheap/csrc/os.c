/*
 * The operating system, through one door: mapping, committing, giving back, liveness locks, futexes
 * and the start of a detached process. Nothing here is called under a shared lock (I-4).
 */
#include "core.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <linux/futex.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23 /* Linux 5.14; headers may be older */
#endif

/* One fallocate of more would be rolled back whole when a signal or a full disk cuts it (I-5). */
#define COMMIT_STEP (1ull << 20)

int sh_os_resize(int fd, uint64_t bytes)
{
    return ftruncate(fd, (off_t)bytes);
}

void *sh_os_map(int fd, uint64_t bytes, bool writable)
{
    int prot = writable ? PROT_READ | PROT_WRITE : PROT_READ;
    void *at = mmap(NULL, bytes, prot, MAP_SHARED | MAP_NORESERVE, fd, 0);
    if (at == MAP_FAILED)
        return NULL;
    madvise(at, bytes,
            MADV_DONTDUMP); /* other processes' data does not belong into our core dump */
    return at;
}

/* Unless it is wanted there. */
void sh_os_dumped(struct sh_ctx *c)
{
    madvise(c->base, c->geo.end, MADV_DODUMP);
}

void sh_os_unmap(void *at, uint64_t bytes)
{
    munmap(at, bytes);
}

/* Reads a range of a file into zeroed memory without making a hole of it memory; what is no longer
 * there reads as zeros. */
int sh_os_copy(int fd, uint64_t off, uint64_t bytes, uint8_t *to)
{
    off_t at = (off_t)off, end = (off_t)(off + bytes);
    while (at < end && (at = lseek(fd, at, SEEK_DATA)) >= 0 && at < end) {
        off_t hole = lseek(fd, at, SEEK_HOLE), until = hole < end ? hole : end;
        while (at < until) {
            ssize_t n = pread(fd, to + (at - (off_t)off), (size_t)(until - at), at);
            if (n <= 0 && errno != EINTR)
                return n == 0 ? 0 : errno;
            at += n > 0 ? n : 0;
        }
    }
    return at < 0 && errno != ENXIO ? errno : 0;
}

/* Zeroed memory of this process alone, which costs nothing until it is touched. */
void *sh_os_private(uint64_t bytes)
{
    void *at = mmap(NULL, bytes, PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return at == MAP_FAILED ? NULL : at;
}

/* A page that a forked child finds zeroed, so that it can tell (FACTS: 0.4 ns a look). */
void *sh_os_wiped_on_fork(void)
{
    uint32_t *at = sh_os_private((uint64_t)sysconf(_SC_PAGESIZE));
    if (at == NULL)
        return NULL;
    if (madvise(at, (size_t)sysconf(_SC_PAGESIZE), MADV_WIPEONFORK) != 0) {
        munmap(at, (size_t)sysconf(_SC_PAGESIZE));
        return NULL;
    }
    *at = 1;
    return at;
}

/* Whether c->fd is still our file: a daemonizer may have closed it, and the number been used again.
 */
bool sh_os_fd_is_ours(const struct sh_ctx *c)
{
    struct stat st;
    return c->fd >= 0 && fstat(c->fd, &st) == 0 && st.st_dev == c->dev && st.st_ino == c->ino;
}

/* Closes c->fd, unless the number is another file's by now. Who cannot tell closes: a number that
 * nothing has can be closed. */
void sh_os_close(const struct sh_ctx *c)
{
    struct stat st;
    if (c->fd >= 0 && (fstat(c->fd, &st) != 0 || (st.st_dev == c->dev && st.st_ino == c->ino)))
        close(c->fd);
}

static int commit_step(struct sh_ctx *c, uint64_t off, uint64_t bytes)
{
    int error;
    do {
        if (sh_os_fd_is_ours(c))
            error = fallocate(c->fd, 0, (off_t)off, (off_t)bytes) == 0 ? 0 : errno;
        else /* faults the pages in without a descriptor, and fails rather than signals */
            error = madvise(c->base + off, bytes, MADV_POPULATE_WRITE) == 0 ? 0
                    : errno == EFAULT || errno == ENOMEM                    ? ENOSPC
                                                                            : errno;
    } while (error == EINTR);
    return error;
}

int sh_os_commit(struct sh_ctx *c, uint64_t off, uint64_t bytes)
{
    uint64_t unit = 1ull << c->geo.unit_shift;
    uint64_t end = (off + bytes + unit - 1) & ~(unit - 1);
    for (off &= ~(unit - 1); off < end;) {
        uint64_t step = end - off < COMMIT_STEP ? end - off : COMMIT_STEP;
        int error = commit_step(c, off, step);
        if (error != 0)
            return error;
        SH_CRASH("commit:step");
        off += step;
    }
    return 0;
}

/* On shared memory MADV_DONTNEED frees nothing; this does (FACTS section 1). */
int sh_os_unused(struct sh_ctx *c, uint64_t off, uint64_t bytes)
{
    int error;
    do
        error = madvise(c->base + off, bytes, MADV_REMOVE) == 0 ? 0 : errno;
    while (error == EINTR || error == EAGAIN);
    return error;
}

static struct flock lock_of_byte(uint64_t byte)
{
    return (struct flock){
        .l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = (off_t)byte, .l_len = 1};
}

/* Holds the byte's lock for as long as this process has the returned page mapped: the lock belongs
 * to an open file that nothing but the mapping refers to (I-8). */
void *sh_os_hold_byte(const struct sh_ctx *c, uint64_t byte, bool inherited)
{
    char path[64];
    errno = EBADF; /* our descriptor was closed, and perhaps its number is another file's now */
    if (!sh_os_fd_is_ours(c))
        return NULL;
    snprintf(path, sizeof path, "/proc/self/fd/%d", c->fd);
    int own =
        open(path, O_RDWR | O_CLOEXEC); /* an open file of its own, also of an unlinked file */
    if (own < 0)
        return NULL;
    struct flock l = lock_of_byte(byte);
    void *at = NULL;
    if (fcntl(own, F_OFD_SETLK, &l) == 0) {
        at = mmap(NULL, (size_t)sysconf(_SC_PAGESIZE), PROT_READ, MAP_SHARED, own, 0);
        if (at == MAP_FAILED)
            at = NULL;
        else
            madvise(at, (size_t)sysconf(_SC_PAGESIZE), MADV_DONTDUMP);
        if (at != NULL && !inherited)
            sh_os_not_inherited(at);
    }
    int error = errno;
    close(own);
    errno = error == EACCES ? EAGAIN : error;
    return at;
}

void sh_os_not_inherited(void *held)
{
    madvise(held, (size_t)sysconf(_SC_PAGESIZE), MADV_DONTFORK);
}

void sh_os_let_go(void *held)
{
    munmap(held, (size_t)sysconf(_SC_PAGESIZE));
}

bool sh_os_byte_is_held(const struct sh_ctx *c, uint64_t byte)
{
    struct flock l = lock_of_byte(byte);
    if (!sh_os_fd_is_ours(c) || fcntl(c->fd, F_OFD_GETLK, &l) != 0)
        return true; /* cannot tell: nobody is declared dead on a guess */
    return l.l_type != F_UNLCK;
}

uint64_t sh_os_now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000ull + (uint64_t)t.tv_nsec;
}

uint64_t sh_os_pid_namespace(void)
{
    struct stat st;
    return stat("/proc/self/ns/pid", &st) == 0 ? st.st_ino : 0;
}

/* Whether a thread is there and has the arena mapped. Who cannot tell says that it may. A file of
 * another file system with our number looks like ours: that errs on the safe side. */
bool sh_os_may_hold(const struct sh_ctx *c, uint32_t thread)
{
    char path[64], line[512];
    unsigned long long inode;
    bool found = false;
    snprintf(path, sizeof path, "/proc/%u/maps", thread);
    FILE *maps = thread == 0 ? NULL : fopen(path, "re");
    if (maps == NULL) /* another user's may be hidden from us */
        return thread != 0 && (kill((pid_t)thread, 0) == 0 || errno != ESRCH);
    while (!found && fgets(line, sizeof line, maps) != NULL)
        found = sscanf(line, "%*x-%*x %*4s %*x %*x:%*x %llu", &inode) == 1 && inode == c->ino;
    fclose(maps);
    return found; /* no line: no memory, as a kernel thread or a zombie */
}

int sh_os_wait(_Atomic uint32_t *word, uint32_t seen, int wait_ms)
{
    struct timespec t = {.tv_sec = wait_ms / 1000, .tv_nsec = (long)(wait_ms % 1000) * 1000000};
    long rc = syscall(SYS_futex, word, FUTEX_WAIT, seen, &t, NULL, 0);
    return rc == 0 || errno == EAGAIN ? 0 : errno;
}

void sh_os_wake(_Atomic uint32_t *word)
{
    syscall(SYS_futex, word, FUTEX_WAKE, INT32_MAX, NULL, NULL, 0);
}

void sh_os_nap(long ns)
{
    struct timespec t = {.tv_nsec = ns};
    nanosleep(&t, NULL);
}

struct program {
    char *const *argv;
    const char *log_path; /* for stderr; NULL: nowhere */
    int input;            /* its stdin, an arena; -1: nothing */
    char input_path[32];
    volatile int error; /* errno, with SH_LOG_FAILED if it was the log */
};

/* Signals do to it what they do to a program that nobody has prepared. */
static void forget_signals(void)
{
    sigset_t none;
    for (int n = 1; n < NSIG; n++)
        signal(n, SIG_DFL);
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
}

/* A FIFO that nobody reads is an error: whoever starts a coordinator waits for this. */
static int open_log(const char *path)
{
    int log = open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC | O_NONBLOCK, 0600);
    if (log >= 0)
        fcntl(log, F_SETFL, O_APPEND);
    return log;
}

/* The arena through an open file of the program's own, whose lock says that it starts for as long
 * as it keeps the file: to its death at most. That another has the lock is no reason not to start.
 */
static int open_input(const struct program *p)
{
    struct flock l = lock_of_byte(SH_START_BYTE);
    int own = p->input < 0 ? -1 : open(p->input_path, O_RDWR | O_CLOEXEC);
    if (own < 0)
        return p->input;
    fcntl(own, F_OFD_SETLK, &l);
    return own;
}

/* The grandchild: no terminal, no inherited descriptors but one. Only async-signal-safe calls:
 * other threads of the parent may hold any lock. */
static void run_program(struct program *p)
{
    int null = open("/dev/null", O_RDWR);
    int log = p->log_path ? open_log(p->log_path) : null;
    if (log >= 0) {
        if (dup2(open_input(p), 0) < 0)
            dup2(null, 0);
        dup2(null, 1);
        dup2(log, 2);
        forget_signals();
        syscall(SYS_close_range, 3u, ~0u, 0u);
        execv(p->argv[0], p->argv);
    }
    p->error = (log < 0 ? SH_LOG_FAILED : 0) | (errno & ~SH_LOG_FAILED);
    _exit(127);
}

/* The child: makes a session that the grandchild does not lead, and is gone when that runs. */
static int stand_between(void *program)
{
    setsid();
    pid_t grandchild = vfork();
    if (grandchild == 0)
        run_program(program);
    if (grandchild < 0)
        ((struct program *)program)->error = errno;
    _exit(0);
}

#define CHILD_STACK_BYTES 65536

/* Returns when the program has been started, or could not be: 0 or errno, with SH_LOG_FAILED if it
 * was the log that could not be opened. Both children run in our memory, which costs the same
 * however much of it there is, while this thread waits. Other threads go on. Nobody's fork handlers
 * run, and no SIGCHLD says that the first one has ended. */
int sh_os_spawn_detached(char *const argv[], const char *log_path, int input)
{
    struct program program = {.argv = argv, .log_path = log_path, .input = input};
    snprintf(program.input_path, sizeof program.input_path, "/proc/self/fd/%d", input);
    _Alignas(16) char stack[CHILD_STACK_BYTES];
    sigset_t all, before;
    sigfillset(&all); /* a handler of ours must not run in a child */
    pthread_sigmask(SIG_SETMASK, &all, &before);
    pid_t child = clone(stand_between, stack + sizeof stack, CLONE_VM | CLONE_VFORK, &program);
    int error = errno;
    while (child > 0 && waitpid(child, NULL, __WCLONE) < 0 && errno == EINTR) {
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return child < 0 ? error : program.error;
}
