/*
 * Robust locks and the undo log (I-2, I-3).
 *
 * Three locks have a log: registry, roots and heap. An operation holds at most one of them, and at
 * most one process lock inside it; the log is that of the outer one. A process lock guards pins,
 * leases, references and block words, none of which is ever logged: whoever finds its holder dead
 * has nothing to repair. So recovery never needs a second lock.
 */
#include "core.h"

#include <errno.h>
#include <linux/futex.h>
#include <time.h>

/* What a single process would do without: for tools/bench.py lock, which says what they cost. */
#ifdef SH_NO_LOCKS
#define LOCKS 0
#else
#define LOCKS 1
#endif

#ifdef SH_DEBUG
/* Ranks held by this thread, a bit each: locks are taken in ascending order, two at most. */
static _Thread_local uint32_t ranks_held;
static void rank_taken(uint32_t rank)
{
    assert((ranks_held >> rank) == 0 && "locks are taken in rank order");
    assert(__builtin_popcount(ranks_held) < 2 && "at most two locks at once");
    ranks_held |= 1u << rank;
}
static void rank_left(uint32_t rank)
{
    ranks_held &= ~(1u << rank);
}
void sh_fork_ranks(void)
{
    ranks_held = 0;
}
uint32_t sh_ranks_held(void)
{
    return ranks_held;
}
#else
void sh_fork_ranks(void)
{
}
uint32_t sh_ranks_held(void)
{
    return 0;
}
static inline void rank_taken(uint32_t rank)
{
    (void)rank;
}
static inline void rank_left(uint32_t rank)
{
    (void)rank;
}
#endif

int sh_mutex_init(pthread_mutex_t *m)
{
    pthread_mutexattr_t a;
    pthread_mutexattr_init(&a);
    pthread_mutexattr_setpshared(&a, PTHREAD_PROCESS_SHARED);
    pthread_mutexattr_setrobust(&a, PTHREAD_MUTEX_ROBUST);
    pthread_mutexattr_settype(&a, PTHREAD_MUTEX_ERRORCHECK);
    int rc = pthread_mutex_init(m, &a);
    pthread_mutexattr_destroy(&a);
    return rc;
}

void sh_lock_init(struct sh_lock *l, uint32_t rank)
{
    sh_mutex_init(&l->mutex);
    l->rank = rank;
    atomic_store(&l->len, 0);
    atomic_store(&l->rebuild, 0);
}

/* What libc makes of those attributes. A mutex of another kind was not made by us, and libc would
 * trust it: with priority inheritance, for one, it aborts. */
int sh_mutex_kind(void)
{
    pthread_mutex_t m;
    return sh_mutex_init(&m) == 0 ? m.__data.__kind : 0;
}

static uint32_t holder_of(pthread_mutex_t *m)
{
    return (uint32_t)__atomic_load_n(&m->__data.__lock, __ATOMIC_ACQUIRE);
}

/* The word has named one thread all the time, which cannot have taken the mutex: the kernel clears
 * the word of a thread that ends. */
static bool nobody_holds(const struct sh_ctx *c, pthread_mutex_t *m, uint32_t holder)
{
    return !(holder & FUTEX_OWNER_DIED) && !sh_os_may_hold(c, holder & FUTEX_TID_MASK) &&
           holder_of(m) == holder;
}

#define LOOK_MS 50 /* waited for one holder before a look whether there is one */

/* 0, EOWNERDEAD, EBUSY or ETIMEDOUT; anything else: these bytes are no mutex. */
static int acquire(const struct sh_ctx *c, pthread_mutex_t *m, int wait_ms)
{
    if (!LOCKS)
        return 0;
    int rc = m->__data.__kind == c->mutex_kind ? pthread_mutex_trylock(m) : EINVAL;
    uint64_t now = wait_ms != 0 && rc == EBUSY ? sh_os_now_ns() : 0;
    uint64_t until = now + (uint64_t)wait_ms * 1000000u, step = LOOK_MS * 1000000u;
    while ((rc == EBUSY || rc == ETIMEDOUT) && now < until) {
        uint32_t holder = holder_of(m);
        uint64_t next = until - now < step ? until : now + step;
        struct timespec t = {.tv_sec = (time_t)(next / 1000000000u),
                             .tv_nsec = (long)(next % 1000000000u)};
        rc = pthread_mutex_clocklock(m, CLOCK_MONOTONIC, &t);
        if (rc == ETIMEDOUT && nobody_holds(c, m, holder))
            return EINVAL;
        now = next;
    }
    return rc;
}

/* Process locks. Only the process itself and the coordinator take one, so it is nearly always free;
 * one word, because a pthread mutex would be a third of the cost of an allocation (measured, see
 * docs/explanation/locks.md). Whoever waits for a holder that has lost its liveness lock, or that
 * has been followed by another incarnation, takes over (I-8). */

#define SPINS 200
#define NAP_NS                                                                        \
    20000 /* 75 us with the kernel's slack: a look whether the holder lives costs 2 % \
           */

/* Or a word that nobody writes: it is like that of one who is dead. */
static bool holder_is_dead(struct sh_ctx *c, uint64_t holder)
{
    uint32_t slot = SH_SPAN_SLOT(holder);
    uint64_t now = SH_OWNER(slot, atomic_load_explicit(&sh_slot(c, slot)->incarnation, ACQ));
    return holder != (now | 1) || !sh_alive(c, slot);
}

static bool take_word(_Atomic uint64_t *lock, uint64_t from, uint64_t me)
{
    return atomic_compare_exchange_strong_explicit(lock, &from, me, ACQ, RLX);
}

/* *dead: 0, or the dead holder that it was taken from. */
static bool wait_for_word(struct sh_ctx *c, _Atomic uint64_t *lock, uint64_t me, int wait_ms,
                          uint64_t *dead)
{
    uint64_t until = sh_os_now_ns() + (uint64_t)wait_ms * 1000000u;
    for (;;) {
        for (int spin = 0; spin < SPINS; spin++) {
            if (atomic_load_explicit(lock, RLX) == 0 && take_word(lock, 0, me))
                return true;
            sh_os_pause();
        }
        uint64_t holder = atomic_load_explicit(lock, ACQ);
        *dead = holder != 0 && holder != me && holder_is_dead(c, holder) ? holder : 0;
        if (*dead != 0 && take_word(lock, holder, me))
            return true;
        *dead = 0;
        if (sh_os_now_ns() >= until)
            return false;
        sh_os_nap(NAP_NS);
    }
}

/* Is this the coordinator? */
static bool leads(const struct sh_ctx *c)
{
    return c->slot != NULL && c->slot_index == 0;
}

/* Coordinator: whoever wanted what it had since then has waited so long. */
void sh_kept_waiting(struct sh_ctx *c, uint64_t since_ns)
{
    uint64_t waited = sh_os_now_ns() - since_ns;
    c->longest_ns = waited > c->longest_ns ? waited : c->longest_ns;
}

/* A wait for nothing. Of a coordinator it was its patience: whoever was stopped holds up more waits
 * than this one, and not each of them shall take so long. */
static enum sh_status in_vain(struct sh_ctx *c, int wait_ms)
{
    if (leads(c) && wait_ms > SH_SPENT_MS)
        c->patience_ms = SH_SPENT_MS;
    return SH_BUSY;
}

enum sh_status sh_process_lock(struct sh_ctx *c, struct sh_slot *s, int wait_ms)
{
    uint64_t me = c->owner | 1;
    uint64_t dead;
    if (LOCKS && !take_word(&s->lock, 0, me) &&
        (wait_ms == 0 || !wait_for_word(c, &s->lock, me, wait_ms, &dead)))
        return in_vain(c, wait_ms);
    rank_taken(SH_RANK_PROCESS);
    return SH_OK;
}

/* The same kind of lock for a collection, outside the process lock. *dead: 0, or who had it and
 * died, and may have left half of what it did. */
enum sh_status sh_word_lock(struct sh_ctx *c, _Atomic uint64_t *lock, int wait_ms, uint64_t *dead)
{
    uint64_t me = c->owner | 1;
    *dead = 0;
    if (!take_word(lock, 0, me) && (wait_ms == 0 || !wait_for_word(c, lock, me, wait_ms, dead)))
        return in_vain(c, wait_ms);
    rank_taken(SH_RANK_COLLECTION);
    return SH_OK;
}

/* dead: 0, or who is to be found by the next one, as it was by us. */
void sh_word_unlock(_Atomic uint64_t *lock, uint64_t dead)
{
    rank_left(SH_RANK_COLLECTION);
    atomic_store_explicit(lock, dead, REL);
}

/* Takes such a lock if it is nobody's, or a dead process's: 0 not now, 1 ours, 2 ours and the other
 * died. It may be kept over anything: it has no rank. */
int sh_word_try(struct sh_ctx *c, _Atomic uint64_t *lock)
{
    uint64_t me = c->owner | 1, holder = atomic_load_explicit(lock, ACQ);
    if (holder == 0)
        return take_word(lock, 0, me);
    bool died = holder != me && holder_is_dead(c, holder);
    return died && take_word(lock, holder, me) ? 2 : 0;
}

/* False: it is not ours. */
bool sh_word_let(struct sh_ctx *c, _Atomic uint64_t *lock)
{
    uint64_t me = c->owner | 1;
    return atomic_compare_exchange_strong_explicit(lock, &me, 0, REL, RLX);
}

void sh_process_unlock(struct sh_slot *s)
{
    rank_left(SH_RANK_PROCESS);
    if (LOCKS)
        atomic_store_explicit(&s->lock, 0, REL);
}

/* Only words that operations log may be restored: a bad log must not write anywhere else. */
static bool may_be_logged(const struct sh_ctx *c, uint64_t off)
{
    const struct sh_header *h = c->hdr;
    uint64_t heap = (uint64_t)((const uint8_t *)&h->used_pages - c->base);
    uint64_t heap_end = (uint64_t)((const uint8_t *)&h->past_mallocs - c->base);
    if (off % 8 != 0)
        return false;
    return (off >= heap && off < heap_end) || (off >= c->geo.roots && off < c->geo.sites) ||
           (off >= c->geo.pages && off < c->geo.units);
}

/* Newest first. Restoring a word twice is harmless, so a death in here is just another death. */
static bool roll_back(struct sh_ctx *c, struct sh_lock *l)
{
    uint32_t n = atomic_load_explicit(&l->len, ACQ);
    if (n > SH_UNDO_MAX)
        return false;
    for (uint32_t i = n; i-- > 0;) {
        uint64_t off = l->log[i].off;
        if (!may_be_logged(c, off))
            return false;
        atomic_store_explicit((_Atomic uint64_t *)(c->base + off), l->log[i].old, REL);
        SH_CRASH("log:undo");
    }
    sh_commit(l);
    return true;
}

/* By where it lies: the one in the header may have been written over. */
static uint32_t rank_of(const struct sh_ctx *c, const struct sh_lock *l)
{
    return l == &c->hdr->registry ? SH_RANK_REGISTRY
           : l == &c->hdr->roots  ? SH_RANK_ROOTS
                                  : SH_RANK_HEAP;
}

enum sh_status sh_lock(struct sh_ctx *c, struct sh_lock *l, int wait_ms)
{
    if (atomic_load_explicit(&c->hdr->poisoned, RLX))
        return SH_CORRUPT;
    int rc = acquire(c, &l->mutex, wait_ms);
    if (rc == EBUSY || rc == ETIMEDOUT)
        return in_vain(c, wait_ms);
    if (rc != 0 && rc != EOWNERDEAD)
        return sh_corrupt(c, SH_FAULT_LOCK, rank_of(c, l));
    rank_taken(rank_of(c, l));
    bool left_open = rc == 0 && atomic_load_explicit(&l->len, RLX) != 0; /* nobody leaves it so */
    if (left_open || (rc == EOWNERDEAD && !roll_back(c, l)))
        atomic_store_explicit(&l->rebuild, 1, REL); /* until rebuilt, also if we die */
    if (left_open)
        sh_commit(l);
    if (rc == EOWNERDEAD)
        pthread_mutex_consistent(&l->mutex);
    if (atomic_load_explicit(&c->hdr->poisoned, RLX)) {
        sh_unlock(c, l);
        return SH_CORRUPT;
    }
    if (leads(c))
        c->locked_since_ns = sh_os_now_ns();
    return atomic_load_explicit(&l->rebuild, RLX) ? SH_CHANGED : SH_OK;
}

/* Of a poisoned arena, what was found stays as it was found: half an operation is undone. */
void sh_unlock(struct sh_ctx *c, struct sh_lock *l)
{
    if (!atomic_load_explicit(&c->hdr->poisoned, RLX) || !roll_back(c, l))
        sh_commit(l);
    rank_left(rank_of(c, l));
    if (LOCKS)
        pthread_mutex_unlock(&l->mutex);
    if (leads(c))
        sh_kept_waiting(c, c->locked_since_ns);
}

/* The registry lock. Nothing under it is logged, so no death can tear it. */
enum sh_status sh_registry(struct sh_ctx *c, int wait_ms)
{
    enum sh_status status = sh_lock(c, &c->hdr->registry, wait_ms);
    if (status == SH_CHANGED) { /* nothing under it is logged, so nothing is torn */
        sh_lock_rebuilt(&c->hdr->registry);
        status = SH_OK;
    }
    return status;
}

void sh_lock_rebuilt(struct sh_lock *l)
{
    sh_commit(l);
    atomic_store_explicit(&l->rebuild, 0, REL);
}

/* What cannot be repaired is refused by everybody from now on, never used in silence (I-3). The
 * first one to find something is the one to tell. */
enum sh_status sh_corrupt(struct sh_ctx *c, enum sh_fault fault, uint64_t where)
{
    uint64_t sound = 0;
    atomic_compare_exchange_strong(&c->hdr->poisoned, &sound, SH_FAULT(fault, where));
    return SH_CORRUPT;
}

/* The process lock: from reading the phase to the last step of an operation (rule 4). */
enum sh_status sh_enter(struct sh_ctx *c, int wait_ms)
{
    if (c->slot == NULL)
        return SH_CLOSED;
    if (atomic_load_explicit(&c->hdr->poisoned, RLX))
        return SH_CORRUPT; /* for everybody, for ever (I-3) */
    return sh_process_lock(c, c->slot, wait_ms);
}

void sh_leave(struct sh_ctx *c)
{
    sh_process_unlock(c->slot);
}

bool sh_alive(struct sh_ctx *c, uint32_t slot)
{
    return sh_os_byte_is_held(c, sh_slot_byte(c, slot));
}

/* Something for the coordinator. The bell is rung for the first want only; c->ring says it is due.
 */
void sh_want(struct sh_ctx *c, uint32_t bits)
{
    if ((atomic_load(&c->hdr->wants) & bits) == bits)
        return;
    if (atomic_fetch_or(&c->hdr->wants, bits) == 0)
        c->ring = true;
}
