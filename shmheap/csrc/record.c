/*
 * Records: what a shared dict or list keeps of a value, and of the key it stands under. One is
 * written before it can be found and never changes, so whoever finds one reads it without a lock; a
 * new value is a new record. It lives as long as something holds it, like any block.
 */
#include "core.h"

#include <string.h>

/* wyhash's idea: multiply, and fold the two halves; 8 bytes at a time. The same in every process.
 */

static uint64_t fold(uint64_t a, uint64_t b)
{
    __uint128_t m = (__uint128_t)a * b;
    return (uint64_t)m ^ (uint64_t)(m >> 64);
}

/* The n < 8 bytes as a word, another for each content of that length, in reads of fixed sizes. */
static uint64_t tail_of(const uint8_t *p, uint64_t n)
{
    uint32_t first, last;
    if (n < 4)
        return n == 0 ? 0 : p[0] | (uint64_t)p[n / 2] << 8 | (uint64_t)p[n - 1] << 16;
    memcpy(&first, p, 4);
    memcpy(&last, p + n - 4, 4);
    return SH_PAIR(last, first);
}

uint64_t sh_hash(const void *bytes, uint64_t n, uint64_t seed)
{
    const uint8_t *p = bytes;
    uint64_t h = seed ^ 0x9e3779b97f4a7c15ull, word;
    for (; n >= 8; p += 8, n -= 8) {
        memcpy(&word, p, 8);
        h = fold(h ^ word, 0xa0761d6478bd642full);
    }
    return fold(h ^ tail_of(p, n), 0xe7037ed1a0b428dbull ^ n);
}

/* False: the block has no room for what it says that it has. Whoever looks without holding it may
 * meet another block's bytes, so each word is read once. Inline: each look-up asks it. */
inline bool sh_record_label(const struct sh_ref *r, struct sh_label *l)
{
    uint64_t w = atomic_load_explicit(r->word, ACQ), at = 0;
    l->nrefs = 0;
    if (w & SH_NODE) {
        uint64_t head = atomic_load_explicit(&((struct sh_node *)r->data)->head, RLX);
        if (SH_NODE_KIND(head) != SH_NODE_RECORD || !sh_node_fits(head, r->nbytes))
            return false;
        l->nrefs = SH_NODE_NREFS(head);
        at = sizeof(struct sh_node) + 8ull * l->nrefs;
    }
    const struct sh_record *record = (const struct sh_record *)(r->data + at);
    if (r->nbytes < at + sizeof *record)
        return false;
    uint64_t sizes = atomic_load_explicit(&record->sizes, RLX);
    l->hash = atomic_load_explicit(&record->hash, RLX);
    l->kinds = atomic_load_explicit(&record->kinds, RLX);
    l->key_bytes = SH_LO(sizes);
    l->nbytes = SH_HI(sizes);
    l->bytes = record->bytes;
    return (uint64_t)l->key_bytes + l->nbytes <= r->nbytes - at - sizeof *record;
}

/* Making one. Locked */

static uint64_t record_bytes(const struct sh_key *k, const struct sh_value *v)
{
    return sizeof(struct sh_record) + (k ? k->nbytes : 0) + v->nbytes;
}

static void fill(struct sh_record *record, const struct sh_key *k, const struct sh_value *v)
{
    uint32_t key_bytes = k ? k->nbytes : 0;
    atomic_store_explicit(&record->hash, k ? k->hash : 0, RLX);
    atomic_store_explicit(&record->sizes, SH_PAIR(v->nbytes, key_bytes), RLX);
    atomic_store_explicit(&record->kinds,
                          SH_RECORD_KINDS(k ? k->kind : 0, k ? k->form : 0, v->kind), RLX);
    if (key_bytes != 0)
        memcpy(record->bytes, k->bytes, key_bytes);
    if (v->nbytes != 0)
        memcpy(record->bytes + key_bytes, v->bytes, v->nbytes);
}

/* What the value names is counted, and written as references of the node. The caller holds it. */
static bool name_refs(struct sh_ctx *c, struct sh_node *n, const struct sh_value *v)
{
    for (uint32_t i = 0; i < v->nrefs; i++) {
        if (!sh_count_up(v->refs[i].word, v->refs[i].gen, sh_phase(c)))
            return false;
        atomic_store_explicit(&n->ref[i], sh_cell_of(c, &v->refs[i]), REL);
    }
    return true;
}

/* A record that nobody holds yet, with count 1: its holder is written by the caller, before it
 * leaves the lock. Sizes were checked. SH_SLOW: no free block of the class is known, refill
 * sh_record_class. */
enum sh_status sh_record_take(struct sh_ctx *c, const struct sh_key *k, const struct sh_value *v,
                              bool node, struct sh_ref *r)
{
    uint64_t refs = node ? sizeof(struct sh_node) + 8ull * v->nrefs : 0;
    uint64_t head = node ? SH_NODE_HEAD(SH_NODE_RECORD, v->nrefs) : 0;
    enum sh_status status = sh_take(c, refs + record_bytes(k, v), head, r);
    if (status != SH_OK)
        return status;
    fill((struct sh_record *)(r->data + refs), k, v);
    if (name_refs(c, (struct sh_node *)r->data, v))
        return SH_OK;
    sh_count_down(c, r, sh_phase(c)); /* nobody ever held it */
    return SH_STALE;
}

enum sh_status sh_record_refill(struct sh_ctx *c, const struct sh_key *k, const struct sh_value *v,
                                bool node, int wait_ms)
{
    uint64_t refs = node ? sizeof(struct sh_node) + 8ull * v->nrefs : 0;
    if (wait_ms == 0)
        return SH_BUSY; /* it may need system calls */
    return sh_refill(c, sh_class_of((uint32_t)(refs + record_bytes(k, v))), wait_ms);
}

/* A value that stands alone, pinned: for a named root. */
enum sh_status sh_record_new(struct sh_ctx *c, const struct sh_value *v, int wait_ms,
                             struct sh_ref *r)
{
    for (;;) {
        enum sh_status status = sh_enter_with_pin(c, wait_ms);
        if (status != SH_OK)
            return status;
        status = sh_record_take(c, NULL, v, true, r);
        if (status == SH_OK)
            status = sh_pin(c, r);
        sh_leave(c);
        if (status == SH_SLOW)
            status = sh_record_refill(c, NULL, v, true, wait_ms);
        else
            return status;
        if (status != SH_OK)
            return status;
    }
}

/* Reading one. Locked */

/* Others may free the record while we compare: a race by design, and what is found is thrown away
 * if the record is not what it was. */
__attribute__((no_sanitize("thread"))) static bool same(const uint8_t *a, const uint8_t *b,
                                                        uint32_t n)
{
    return memcmp(a, b, n) == 0;
}

__attribute__((no_sanitize("thread"))) static void copy(uint8_t *to, const uint8_t *from,
                                                        uint32_t n)
{
    memcpy(to, from, n);
}

inline bool sh_label_is(const struct sh_label *l, const struct sh_key *k)
{
    return l->hash == k->hash && (l->kinds & 0xffu) == k->kind && l->key_bytes == k->nbytes &&
           same(l->bytes, k->bytes, k->nbytes);
}

/* Says what is in a record at which we have looked. It is copied if it names nothing and there is
 * room for it; else it is pinned. SH_SLOW: no pin is free. SH_AGAIN: it is gone. */
enum sh_status sh_record_found(struct sh_ctx *c, const struct sh_ref *r, const struct sh_label *l,
                               struct sh_found *f, uint8_t *to, uint32_t room)
{
    f->key_kind = (uint32_t)l->kinds & 0xffu;
    f->key_form = SH_RECORD_FORM(l->kinds);
    f->kind = (uint32_t)(l->kinds >> 16) & 0xffu;
    f->key_bytes = l->key_bytes;
    f->nbytes = l->nbytes;
    f->nrefs = l->nrefs;
    f->pinned = l->nrefs != 0 || (uint64_t)l->key_bytes + l->nbytes > room;
    f->key = f->pinned ? l->bytes : to;
    f->value = f->key + l->key_bytes;
    if (!f->pinned) {
        copy(to, l->bytes, l->key_bytes + l->nbytes);
        return SH_OK;
    }
    if (!sh_count_up(r->word, r->gen, sh_phase(c)))
        return SH_AGAIN;
    f->record = *r;
    enum sh_status status = sh_pin(c, &f->record);
    if (status != SH_OK)
        sh_count_down(c, r, sh_phase(c));
    return status;
}

/* Of a record that is held: as found, without a further pin. */
enum sh_status sh_record_get(struct sh_ctx *c, const struct sh_ref *r, int wait_ms,
                             struct sh_found *f)
{
    enum sh_status status = sh_enter_with_pin(c, wait_ms);
    if (status != SH_OK)
        return status;
    struct sh_label l;
    status =
        sh_record_label(r, &l) ? sh_record_found(c, r, &l, f, f->small, sizeof f->small) : SH_AGAIN;
    if (status == SH_AGAIN)
        status = sh_corrupt(c, SH_FAULT_NODE, sh_word_number(c, r->word));
    sh_leave(c);
    return status;
}

/* Pins what the i-th reference of a pinned record names. */
enum sh_status sh_record_ref(struct sh_ctx *c, const struct sh_found *f, uint32_t i, int wait_ms,
                             struct sh_ref *r)
{
    return sh_node_load(c, &f->record, i, wait_ms, r);
}
