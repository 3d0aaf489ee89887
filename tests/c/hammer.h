/*
 * A user that does anything at random, for threads that play processes and for processes that are
 * killed.
 *
 * Each block says by its first bytes what the others must be, and its bytes are written once,
 * before anybody else knows of it. Whoever holds it checks them: an overlap, a use after free, or a
 * page given back under its user, shows as a wrong byte.
 */
#ifndef SHMHEAP_TEST_HAMMER_H
#define SHMHEAP_TEST_HAMMER_H

#include "support.h"

#define HELD    48u
#define LETTERS 64u

/* Handles on their way between users; may be opened more than once, or never. */
struct letter {
    _Atomic uint32_t state; /* 0: none, 1: one is there, else: whoever has it in hand */
    struct handle handle;
    uint64_t nbytes;
};

struct mail {
    struct letter letter[LETTERS];
    _Atomic uint64_t opened, stale, full;
};

struct user {
    struct sh_ctx *c;
    struct mail *mail;
    uint32_t id; /* 2 and up, unlike those of the others */
    struct rng rng;
    uint64_t count;
    struct sh_ref held[HELD]; /* nbytes 0: an empty hand */
};

void user_step(struct user *);
void user_drop_all(struct user *);
void mail_forget(struct mail *, uint32_t id); /* the user with this id is no more */
void mail_end(struct mail *,
              struct sh_ctx *); /* opens every letter, drops what was in it, and the names */
void mail_say(const struct mail *, const struct sh_ctx *, uint64_t deaths);

#endif
