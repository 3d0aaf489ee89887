/*
 * Processes: taking a slot, holding it, leaving it, and what a fork does.
 *
 * A slot is alive as long as an open file lock on its first byte is held; the lock belongs to a
 * mapping and goes when the address space goes (I-8). The reaper (coord.c) takes what a dead slot
 * held.
 */
#include "core.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* Everything of a slot that is its user's. The state comes last: until then the slot is FREE. */
static void init_slot(struct sh_ctx *c, struct sh_slot *s, uint32_t pid)
{
    uint32_t incarnation = atomic_load(&s->incarnation) + 1;
    incarnation += (incarnation & 0x7fffu) == 0; /* 0 in a span record is nobody */
    atomic_store(&s->incarnation, incarnation);
    atomic_store(&s->pid, pid);
    atomic_store(&s->phase, atomic_load(&c->hdr->phase));
    atomic_store(&s->waiting, 0);
    atomic_store(&s->refused, 0);
    atomic_store(&s->remote[0], 0);
    atomic_store(&s->remote[1], 0);
    atomic_store(&s->leases_taken, 0);
    atomic_store(&s->ended_ns, 0);
    _Atomic uint64_t *const counters[] = {&s->mallocs, &s->frees,  &s->alloc_bytes, &s->freed_bytes,
                                          &s->pins,    &s->leases, &s->dying,       &s->transit};
    for (size_t i = 0; s != sh_slot(c, 0) && i < sizeof counters / sizeof counters[0]; i++)
        atomic_store(counters[i], 0); /* a coordinator goes on where the last one ended */
    atomic_store(&s->state, SH_SLOT_LIVE);
}

/* Under the registry lock: the closing flag is looked at again, and the global phase is taken (rule
 * 10), so that a cycle that starts now flips this slot too. */
static enum sh_status register_slot(struct sh_ctx *c, uint32_t slot, int wait_ms)
{
    struct sh_slot *s = sh_slot(c, slot);
    const uint32_t pid = (uint32_t)getpid(); /* a system call: not under the lock (I-4) */
    enum sh_status status = sh_registry(c, wait_ms);
    if (status != SH_OK)
        return status;
    uint32_t used = atomic_load(&c->hdr->slots_used);
    if (atomic_load(&c->hdr->closing) && slot != 0) {
        status = SH_CLOSED;
    } else if (slot != 0 && slot < used && atomic_load(&s->state) != SH_SLOT_FREE) {
        status = SH_CHANGED;
    } else {
        init_slot(c, s, pid);
        SH_CRASH("attach:registered");
        if (slot >= used)
            atomic_store(&c->hdr->slots_used, slot + 1);
    }
    sh_unlock(c, &c->hdr->registry);
    return status;
}

static enum sh_status try_slot(struct sh_ctx *c, uint32_t slot, bool inherited, int wait_ms)
{
    uint32_t used = atomic_load(&c->hdr->slots_used);
    if (slot < used && slot != 0 && atomic_load(&sh_slot(c, slot)->state) != SH_SLOT_FREE)
        return SH_CHANGED;
    enum sh_status status =
        sh_status_of_errno(sh_os_commit(c, sh_slot_byte(c, slot), sizeof(struct sh_slot)));
    if (status != SH_OK)
        return status;
    void *held = sh_os_hold_byte(c, sh_slot_byte(c, slot), inherited);
    if (held == NULL)
        return errno == EAGAIN ? SH_CHANGED : SH_SYSTEM;
    SH_CRASH("attach:held");
    status = register_slot(c, slot, wait_ms);
    if (status != SH_OK) {
        sh_os_let_go(held);
        return status;
    }
    c->alive = held;
    c->slot_index = slot;
    c->owner = SH_OWNER(slot, atomic_load(&sh_slot(c, slot)->incarnation));
    c->lease_seq = (uint32_t)sh_os_now_ns(); /* not again the numbers of who was here before */
    c->slot = sh_slot(c, slot);
    return SH_OK;
}

static enum sh_status find_slot(struct sh_ctx *c, bool inherited, int wait_ms)
{
    for (uint32_t slot = 1; slot < SH_MAX_SLOTS; slot++) {
        enum sh_status status = try_slot(c, slot, inherited, wait_ms);
        if (status != SH_CHANGED)
            return status;
    }
    return SH_NOSLOT;
}

/* Makes the context a user of the arena. SH_CLOSED: the heap is being unlinked, look for its name
 * again. Cost: a few system calls, the registry lock. */
enum sh_status sh_attach(struct sh_ctx *c, int wait_ms)
{
    enum sh_status status = find_slot(c, false, wait_ms);
    if (status == SH_OK)
        sh_want(c, SH_WANT_REAP); /* the coordinator watches the new process */
    return status;
}

/* Slot 0, of which the lock makes the coordinator the only one. SH_CHANGED: there is one. */
enum sh_status sh_attach_coordinator(struct sh_ctx *c, int wait_ms)
{
    return try_slot(c, 0, false, wait_ms);
}

/* Under the registry lock: a slot of ours that nobody unpickles from is as good as free, so if it
 * is the last one the heap may close here and now. */
static bool close_if_last(struct sh_ctx *c)
{
    bool last = sh_leases(c->slot) == 0;
    if (sh_registry(c, 1000) != SH_OK)
        return false;
    for (uint32_t i = 1; last && i < sh_slots_used(c); i++)
        last = i == c->slot_index || atomic_load(&sh_slot(c, i)->state) == SH_SLOT_FREE;
    if (last)
        atomic_store(&c->hdr->closing, 1);
    sh_unlock(c, &c->hdr->registry);
    SH_CRASH("detach:judged");
    return last;
}

/* Leaves. Pins, leases and spans that are left are the reaper's. Unless the heap is to be kept, the
 * last user closes it for ever and may then unlink it: should the coordinator die in this moment,
 * nobody else would. True: we did. */
bool sh_detach(struct sh_ctx *c, bool keep)
{
    bool closed = false;
    if (c->slot == NULL)
        return false;
    while (sh_flush(c, 1000) == SH_BUSY) {
    }
    if (c->slot_index != 0) {
        closed = (!keep || atomic_load(&c->hdr->unlinked)) && close_if_last(c);
        atomic_store(&c->slot->state, SH_SLOT_DETACHED);
        SH_CRASH("detach:left");
        sh_want(c, SH_WANT_LEAVE);
    }
    sh_pspans_forget(c);
    c->slot = NULL;
    sh_os_let_go(c->alive);
    c->alive = NULL;
    return closed;
}

/* Asking the coordinator */

uint32_t sh_request(struct sh_ctx *c, enum sh_request kind)
{
    uint32_t ticket = atomic_fetch_add(&c->hdr->requests[kind].wanted, 1) + 1;
    sh_want(c, kind == SH_REQ_GC ? SH_WANT_GC : SH_WANT_SCAVENGE);
    return ticket;
}

#define STARTING_MS 1000u /* an interpreter's start is 100 ms, more on a busy machine */
#define SPAWNING_MS 30u   /* until its byte is locked */
#define HURRIES     32u   /* that so many die as they start is no chance */

/* Whether it is ours to start a successor. Of all who find that there is none, one does it: ten
 * interpreters that start at once take the time from each other, and from everybody else. Should it
 * have died before it began, or nobody have come of it, it is somebody's turn again. */
bool sh_may_start(struct sh_ctx *c)
{
    uint64_t now = sh_os_now_ns() / 1000000u, was = atomic_load(&c->hdr->started);
    uint64_t since = now - (was >> 16), times = was & 0xffffu;
    bool dead = since >= SPAWNING_MS && times < HURRIES && !sh_os_byte_is_held(c, SH_START_BYTE);
    return (was == 0 || since >= STARTING_MS || dead) &&
           atomic_compare_exchange_strong(&c->hdr->started, &was,
                                          now << 16 | (times < HURRIES ? times + 1 : HURRIES));
}

/* Then the next one need not wait. */
void sh_start_failed(struct sh_ctx *c)
{
    atomic_store(&c->hdr->started, 0);
}

enum sh_status sh_await(struct sh_ctx *c, enum sh_request kind, uint32_t ticket, int wait_ms)
{
    _Atomic uint32_t *done = &c->hdr->requests[kind].done;
    uint32_t seen = atomic_load(done);
    if ((int32_t)(seen - ticket) >= 0)
        return SH_OK;
    if (atomic_load(&c->hdr->poisoned))
        return SH_CORRUPT; /* nobody will answer */
    sh_os_wait(done, seen, wait_ms);
    return (int32_t)(atomic_load(done) - ticket) >= 0 ? SH_OK : SH_TIMEOUT;
}

/* fork (rule 15). The parent prepares a slot for the child, with every pin counted twice, and holds
 * its own process lock until the fork is over, so that no other thread is in the middle of
 * anything. */

static bool copy_pins(struct sh_ctx *c, struct sh_ctx *child, uint32_t number)
{
    const struct sh_pspan *from = c->pin_spans[number];
    struct sh_pspan *to = child->pin_spans[number];
    uint32_t phase = atomic_load(&c->slot->phase);
    uint64_t n = 0;
    for (uint32_t i = 0; from != NULL && i < from->nblocks; i++) {
        uint64_t cell = atomic_load_explicit((_Atomic uint64_t *)sh_data(c, from->page) + i, RLX);
        struct sh_ref r;
        if (cell == 0 || !sh_locate(c, SH_CELL_WORD(cell), &r))
            continue;
        uint64_t gen = SH_GEN(atomic_load_explicit(r.word, ACQ)); /* our pin keeps it */
        if (!sh_count_up(r.word, gen, phase))
            continue;
        atomic_store_explicit((_Atomic uint64_t *)sh_data(child, to->page) + i, cell, REL);
        n++;
    }
    sh_bump(&child->slot->pins, n);
    return n != 0;
}

/* On success the child has room for each of our pins, and our process lock is held. */
static enum sh_status enter_with_child_pins(struct sh_ctx *c, struct sh_ctx *child)
{
    for (;;) {
        enum sh_status status = sh_enter(c, 60000);
        if (status != SH_OK)
            return status;
        sh_pspans_prune(c, SH_KIND_PINS);
        uint32_t wanted = c->npin_spans;
        if (wanted <= child->npin_spans)
            return SH_OK;
        sh_leave(c); /* other threads may take more pins meanwhile */
        while (status == SH_OK && child->npin_spans < wanted)
            status = sh_pins_reserve(child, 60000);
        if (status != SH_OK)
            return status;
    }
}

static void drop_child(struct sh_ctx *c)
{
    struct sh_ctx *child = c->child;
    c->child = NULL;
    if (child->alive != NULL)
        sh_os_let_go(child->alive);
    sh_pspans_forget(child);
    sh_os_unmap(child->pspan_at, (uint64_t)c->geo.npages * sizeof *c->pspan_at);
    sh_os_unmap(child->pin_spans, (uint64_t)c->geo.npages * sizeof *c->pin_spans);
    free(child);
}

static struct sh_ctx *new_child(const struct sh_ctx *c)
{
    struct sh_ctx *child = malloc(sizeof *child);
    if (child == NULL)
        return NULL;
    *child = *c;
    child->slot = NULL;
    child->alive = NULL;
    child->child = NULL;
    child->npin_spans = child->ndeferred = 0;
    memset(child->shelves, 0, sizeof child->shelves);
    child->pspan_at = sh_os_private((uint64_t)c->geo.npages * sizeof *c->pspan_at);
    child->pin_spans = sh_os_private((uint64_t)c->geo.npages * sizeof *c->pin_spans);
    if (child->pspan_at != NULL && child->pin_spans != NULL)
        return child;
    free(child);
    return NULL;
}

/* Before a fork. On success the process lock is held until sh_fork_parent or sh_fork_child. On
 * failure nothing is, and the child will find itself without a slot (SH_FORKED). Cost: a pass over
 * the pins. */
enum sh_status sh_fork_prepare(struct sh_ctx *c)
{
    if (c->slot == NULL)
        return SH_CLOSED;
    if (c->child != NULL)
        return SH_BUSY; /* another thread is forking */
    c->child = new_child(c);
    if (c->child == NULL)
        return SH_NOMEM;
    enum sh_status status = find_slot(c->child, true, 60000);
    if (status == SH_OK)
        status = enter_with_child_pins(c, c->child);
    if (status != SH_OK) {
        drop_child(c);
        sh_want(c, SH_WANT_REAP); /* what was reserved so far */
        return status;
    }
    SH_CRASH("fork:reserved");
    for (uint32_t i = 0; i < c->npin_spans; i++)
        copy_pins(c, c->child, i);
    sh_pins_publish(c->child);
    SH_CRASH("fork:prepared");
    return SH_OK;
}

/* In the parent, also if the fork failed: then nothing holds the child's slot and it is reaped. */
void sh_fork_parent(struct sh_ctx *c)
{
    if (c->child == NULL)
        return;
    sh_leave(c);
    drop_child(c);
    sh_want(c, SH_WANT_REAP);
}

/* In the child: it takes the slot that was prepared, and owns none of its parent's spans.
 * SH_UNTRUSTED: it came into another PID namespace, and holds nothing (I-8). */
enum sh_status sh_fork_child(struct sh_ctx *c)
{
    struct sh_ctx *child = c->child;
    if (child == NULL)
        return SH_OK; /* not prepared: c->forked stays 0 */
    if (c->hdr->pid_namespace != sh_os_pid_namespace()) {
        drop_child(c);
        return SH_UNTRUSTED;
    }
    c->child = NULL;
    sh_fork_ranks();
    sh_pspans_forget(c);
    sh_os_unmap(c->pspan_at, (uint64_t)c->geo.npages * sizeof *c->pspan_at);
    sh_os_unmap(c->pin_spans, (uint64_t)c->geo.npages * sizeof *c->pin_spans);
    *c = *child;
    free(child);
    sh_os_not_inherited(c->alive);
    atomic_store(&c->slot->pid, (uint32_t)getpid());
    atomic_store(c->forked, 1);
    sh_want(c, SH_WANT_REAP);
    return SH_OK;
}
