/* What happens to a span and its units: spans, OS pages (units) and block words, with deaths anywhere (I-1, I-2, I-3, I-5, I-10).
 *
 * gc.pml shows that counts, leases and the tracing collector agree.  This model takes that for granted (a collection may free
 * whatever is unheld and was not counted up since it began) and asks about the layer below: can a page be handed out twice,
 * punched under somebody, given back twice, read as a hole, or lost?
 *
 * Two workers, a collector with successors, a killer.  Every statement outside atomic{} is one interleaving point; atomic{}
 * is one atomic instruction on one shared word, work under a lock that nobody else can see, or ghost work.
 *
 * The heap has two pages of one unit each.  A span is page 0, page 1, or both: LARGE (one block), SMALL (both pages, two
 * blocks), CELLS (one page of leases or pins, of which one cell is looked at).  Block i of the small class is in unit i, or
 * with -DGEOM=1 block 1 lies across both units.  Words 0 and 1 are the small blocks', words 2 and 3 those of large blocks that
 * begin in page 0 and 1: other tables, so an address meets another word whenever its page is cut into something else.
 *
 * Knobs (-D): OPS operations per worker (OPS1: of worker 1); ACTS free actions of the collector before its closing rounds;
 * KILLS and CKILLS deaths of workers and of collectors; INIT the start state, 0 to 8 (9: any of 0 to 7); GEOM; THREADS (the two
 * workers are threads of one process); NOSPC (fallocate may fail); CELLS (cells in every start state; INIT=8 has them always);
 * BUG_x breaks one rule. */
#ifndef OPS
#define OPS 1
#endif
#ifndef OPS1
#define OPS1 OPS
#endif
#ifndef ACTS
#define ACTS 1
#endif
#ifndef KILLS
#define KILLS 0
#endif
#ifndef CKILLS
#define CKILLS 0
#endif
#ifndef INIT
#define INIT 9
#endif
#ifndef GEOM
#define GEOM 0
#endif
#if INIT==8 && !defined(CELLS)
#define CELLS
#endif

#define NP 2
#define NW 4
#define NIL 7
#define COLL 2                      /* owners: workers 0 and 1, the collector, nobody */
#define NONE 3
#define ORPHANED 9                  /* a lock whose holder died */

/* block word */
#define FREE 0
#define LIVE 1
#define HOLE 2                      /* free, set aside: its unit may be a hole */
/* unit */
#define RELEASED 0
#define COMMITTED 1
#define URESERVED 2                 /* being committed by the span's owner */
#define URELEASING 3                /* being punched by the collector */
/* span record, of the span's first page */
#define SFREE 0
#define LARGE 1
#define INNER 2                     /* second page of a span */
#define RELEASING 3                 /* the collector's */
#define RESERVED(o) (8+(o))
#define SMALL(o) (16+(o))
#define CELL(o) (24+(o))            /* PINS or LEASES */
#define IS_SMALL(w) ((w)>=16 && (w)<24)
#define IS_CELL(w) ((w)>=24)

byte sp[NP];                        /* span records */
bit onlist[NP];                     /* the page is on a free list */
byte wm[NP];                        /* watermark: the generation that the next block of this page gets */
byte un[NP]; bit stamp[NP];         /* unit words: state; seen idle */
bit kern[NP];                       /* what the kernel holds: 1 data, 0 hole */
bit wp[NP];                         /* the small block words of this page are a hole */
byte st[NW], gen[NW], cnt[NW];      /* block words */
bit tch[NW];                        /* counted up since the collection began */
bit cell[NP];                       /* CELLS: the one cell that is looked at holds something */

byte pin[2]; byte pg[2];            /* one pin per worker: a word, and its generation */
byte wire; byte wg;                 /* pickled bytes, an address and a generation: live for ever */
byte lwire;                         /* where a lease was */

byte pl[2];                         /* process locks: 0, 1 + holder, or ORPHANED */
byte hl;                            /* the heap lock */
byte hn, hi, hold;                  /* its undo log: pages (0 = empty), first page, old span record */

bit dead[2], done[2], reaped[2]; bit kdone, ckill;

/* ---- what a block lies on ------------------------------------------------------------------------------------------- */
#define TWO (sp[1]==INNER)          /* pages 0 and 1 are one span */
#define PAGES(k) (((k)==0 && TWO) -> 2 : 1)
#define COVERS(w,u) ((w)==(u) || (w)==(u)+2 || (GEOM==1 && (w)==1 && (u)==0) || ((w)==2 && (u)==1 && TWO))
#define INUSE(w) ((w)<2 -> IS_SMALL(sp[0]) : sp[((w)<2 -> 0 : (w)-2)]==LARGE)
#define ALIVE(w) (st[w]==LIVE && INUSE(w))
#define OK_UNIT(u) (un[u]==COMMITTED && !stamp[u] && kern[u])
#define USABLE(w) ((!COVERS(w,0) || OK_UNIT(0)) && (!COVERS(w,1) || OK_UNIT(1)))
#define READY(u) (un[u]==COMMITTED && !stamp[u])
#ifdef BUG_STRADDLE                 /* looks only at one unit, not at all that a block lies in */
#define WAKEABLE(w) READY(w)
#else
#define WAKEABLE(w) ((!COVERS(w,0) || READY(0)) && (!COVERS(w,1) || READY(1)))
#endif
#define USED(w,u) (ALIVE(w) && COVERS(w,u))
#define UNUSED(u) (!USED(0,u) && !USED(1,u) && !USED(2,u) && !USED(3,u) && !(IS_CELL(sp[u]) && cell[u]))
#define NONE_LIVES(u) (!(st[0]==LIVE && COVERS(0,u)) && !(st[1]==LIVE && COVERS(1,u)))
#define ALL_HOLES(u) ((!COVERS(0,u) || st[0]==HOLE) && (!COVERS(1,u) || st[1]==HOLE))
#define EMPTY (st[0]!=LIVE && st[1]!=LIVE)
#define BUSY(u) (un[u]==URESERVED || un[u]==URELEASING)
#ifdef BUG_TAKE_BUSY
#define AT_REST true                /* an empty small span is taken whatever its units are going through */
#else
#define AT_REST (!BUSY(0) && !BUSY(1))
#endif
#ifdef THREADS
#define O(p) 0                      /* the process, and so the lock and the owner's name, of worker p */
#define GONE(p) (dead[0] && done[0] && done[1])
#else
#define O(p) p
#define GONE(p) (dead[p] && done[p])
#endif
#define PINNED(p,w) (!reaped[p] && pin[p]==(w) && pg[p]==gen[w])
#define HELD(w) (PINNED(0,w) || PINNED(1,w))
#define MAX(x,y) ((x)>(y) -> (x) : (y))

/* ---- locks ---------------------------------------------------------------------------------------------------------- */
inline recover_h() {                /* the taker of an orphaned heap lock rolls the unfinished operation back (I-3) */
  if
#ifndef BUG_NO_ROLLBACK
  :: hl==ORPHANED && hn!=0 ->
     sp[hi]=hold;
     if :: hold==SFREE -> onlist[hi]=1; if :: hn==2 -> sp[1]=SFREE; onlist[1]=1 :: else fi
        :: else -> onlist[hi]=0; if :: hn==2 -> sp[1]=INNER; onlist[1]=0 :: else fi
     fi
#endif
  :: else
  fi;
  hn=0; hi=0; hold=0
}
inline lock(p_,me_) { atomic { (pl[p_]==0 || pl[p_]==ORPHANED) -> pl[p_]=1+me_ } }    /* nothing to repair: no log */
inline unlock(p_) { pl[p_]=0 }
#define HFREE (hl==0 || hl==ORPHANED)
inline log_h(k_,n_) { hi=k_; hn=n_; hold=sp[k_] }
#ifdef BUG_LOOK_UNLOCKED
#define look(k,w_) w_=sp[k]
#else
#define look(k,w_) atomic { HFREE -> recover_h(); hl=0; w_=sp[k] }   /* sh_walk_next: never what an unfinished operation wrote */
#endif
inline hunlock() { atomic { hn=0; hi=0; hold=0; hl=0 } }

/* ---- free lists, under the heap lock: two steps that change, one that commits ------------------------------------------ */
inline take(me_,w_) {               /* sh_pages_take. need: 1 or 2 pages; k: first page, n: pages, n = 0: none */
  atomic { HFREE -> recover_h();
    if
    :: need==1 && onlist[0] -> k=0; n=1
    :: need==1 && onlist[1] -> k=1; n=1
    :: need==2 && onlist[0] && onlist[1] -> k=0; n=2
    :: (need==1 && !onlist[0] && !onlist[1]) || (need==2 && !(onlist[0] && onlist[1])) -> n=0
    fi;
    if
    :: n!=0 ->
       assert(sp[k]==SFREE && (n==1 || sp[1]==SFREE));            /* what a list holds is free: no page belongs to two */
       hl=1+me_; log_h(k,n); onlist[k]=0; if :: n==2 -> onlist[1]=0 :: else fi
    :: else -> hl=0
    fi };
  if :: n!=0 -> atomic { sp[k]=w_; if :: n==2 -> sp[1]=INNER :: else fi }; hunlock() :: else fi
}
inline put(me_,k_,n_,w_) {          /* sh_pages_give: merging with neighbours is implied */
  atomic { HFREE -> recover_h();
    assert(sp[k_]==w_ && (n_==1 || sp[1]==INNER));                /* still its giver's */
    assert(!onlist[k_] && (n_==1 || !onlist[1]));
    assert(!BUSY(k_) && (n_==1 || !BUSY(1)));
    assert(!cell[k_] && (n_==1 || !cell[1]));                     /* and nothing in it is held */
    hl=1+me_; log_h(k_,n_); onlist[k_]=1; if :: n_==2 -> onlist[1]=1 :: else fi };
  atomic { sp[k_]=SFREE; if :: n_==2 -> sp[1]=SFREE :: else fi };
  hunlock()
}

/* ---- block words ---------------------------------------------------------------------------------------------------- */
inline word(x_) { assert(x_>=2 || !wp[x_]) }                          /* an access to a small block's word is not to a hole */
inline count_down(x_,g_) {            /* the CAS; won: this was the last */
  atomic { word(x_); won=0;
    if :: st[x_]==LIVE && gen[x_]==g_ -> cnt[x_]=cnt[x_]-1;
            if :: cnt[x_]==0 -> st[x_]=FREE; gen[x_]=gen[x_]+1; won=1 :: else fi
       :: else fi }
}
#define ADDRESS(w) ((w)%2)
inline come_alive(x_) {               /* with count 1; a handle of an older block of this address must not fit */
  st[x_]=LIVE; cnt[x_]=1; tch[x_]=1;
  assert(!(wire==ADDRESS(x_) && wg==gen[x_]));
  assert(USABLE(x_))
}
#ifdef BUG_GEN_RESTART
#define keep_small() skip             /* sh_span_keep_generations: the words die with the span, their generations must not */
#define keep_large(k_) skip
#else
#define keep_small() wm[0]=MAX(gen[0],gen[1]); wm[1]=MAX(gen[0],gen[1])
#define keep_large(k_) wm[k_]=gen[(k_)+2]
#endif
inline wake(x_) { atomic { word(x_); if :: st[x_]==HOLE && WAKEABLE(x_) -> st[x_]=FREE :: else fi } }   /* claim_free */

/* ---- workers -------------------------------------------------------------------------------------------------------- */
#define MY_SMALL SMALL(O(p))
#define MY_CELL CELL(O(p))
#define MY_RESERVED RESERVED(O(p))
inline commit(u_) {                 /* sh_pages_commit (I-5): the span is RESERVED by this process */
  if
  :: un[u_]==RELEASED -> un[u_]=URESERVED;
     kern[u_]=1;
     atomic { assert(un[u_]==URESERVED && kern[u_]); un[u_]=COMMITTED }
#ifdef NOSPC
  :: un[u_]==RELEASED -> un[u_]=URESERVED; kern[u_]=1; kern[u_]=0; un[u_]=RELEASED; ok=0
#endif
  :: un[u_]!=RELEASED -> assert(un[u_]==COMMITTED); stamp[u_]=0
  fi
}
inline forget() { atomic { k=0; n=0; need=0; b=0; g=0; u=0; w=0; ok=0; won=0 } }

#ifdef BUG_ALLOC_NO_CHECK
#define STILL_MINE true             /* trusts its bitmap and does not look at the span record again */
#else
#define STILL_MINE (sp[0]==MY_SMALL)
#endif

proctype worker(byte p) {
  byte c, k, n, need, b, g, u, w; bit ok, won;
  {
  do
  :: c<(p==0 -> OPS : OPS1) ->
    c++;
    if
    :: atomic { pin[p]==NIL -> w=LARGE; if :: need=1 :: need=2 fi }; goto cut              /* allocate a large block */
#ifdef CELLS
    :: atomic { w=MY_CELL; need=1 }; goto cut                                              /* a span of pins or leases */
#endif
    :: atomic { w=MY_SMALL; need=2 };                                                      /* cut a small span */
cut:   take(p,MY_RESERVED);
       if
       :: n!=0 ->
          ok=1;
          if
          :: w==MY_SMALL -> atomic { wp[0]=0; wp[1]=0; stamp[0]=0; stamp[1]=0; st[0]=HOLE; st[1]=HOLE;   /* init_words */
                                     gen[0]=MAX(wm[0],wm[1]); gen[1]=gen[0]; cnt[0]=0; cnt[1]=0 }
          :: else -> commit(k); if :: n==2 && ok -> commit(1) :: else fi
          fi;
          if
          :: ok && w==LARGE ->                                                             /* publish_large */
             lock(O(p),p);
             atomic { gen[k+2]=wm[k]; assert(sp[k]==MY_RESERVED) };
#ifdef BUG_LARGE_FIRST
             st[k+2]=FREE; sp[k]=LARGE;
             atomic { come_alive(k+2) };
#else
             atomic { come_alive(k+2) };                           /* the block word first: where LARGE stands over a FREE */
             sp[k]=LARGE;                                          /* word, a block is being freed, or a death left it so */
#endif
             atomic { assert(ALIVE(k+2)); pin[p]=k+2; pg[p]=gen[k+2] };
             unlock(O(p))
          :: ok && w==MY_SMALL ->                                                          /* publish */
             lock(O(p),p);
             atomic { assert(sp[0]==MY_RESERVED); sp[0]=MY_SMALL };
             wake(0); wake(1);
             unlock(O(p))
          :: ok && w==MY_CELL ->
             lock(O(p),p);
             atomic { assert(sp[k]==MY_RESERVED && OK_UNIT(k)); cell[k]=0; sp[k]=MY_CELL };
             unlock(O(p))
          :: !ok -> put(p,k,n,MY_RESERVED)
          fi
       :: else
       fi
    :: pin[p]!=NIL ->                                                                      /* drop the pin: sh_unpin */
       lock(O(p),p);
       atomic { b=pin[p]; g=pg[p]; assert(ALIVE(b) && gen[b]==g); assert(USABLE(b)) };
       atomic { pin[p]=NIL; pg[p]=0 };
       count_down(b,g);
       if
       :: won && b>=2 ->                                                                   /* sh_block_freed, sh_flush */
          atomic { assert(sp[b-2]==LARGE); k=b-2; n=PAGES(k); keep_large(k) };
#ifdef BUG_LIST_FIRST
          put(p,k,n,LARGE); sp[k]=MY_RESERVED; unlock(O(p))
#else
          sp[k]=MY_RESERVED;
          unlock(O(p));
          put(p,k,n,MY_RESERVED)
#endif
       :: else -> unlock(O(p))
       fi
    :: sp[0]==SMALL(NONE) ->                                                               /* adopt, publish */
       atomic { HFREE -> recover_h();
         if :: sp[0]==SMALL(NONE) -> hl=1+p; log_h(0,2); sp[0]=MY_SMALL; ok=1 :: else -> hl=0 fi };
       if
       :: ok -> hunlock();
          lock(O(p),p);
#ifdef BUG_PUBLISH_BLINDLY
          sp[0]=MY_SMALL; wake(0); wake(1);                        /* writes the record again without looking */
#else
          if :: sp[0]==MY_SMALL -> sp[0]=MY_SMALL; wake(0); wake(1) :: else fi;   /* or the collector found it empty first */
#endif
          unlock(O(p))
       :: else
       fi
    :: sp[0]==MY_SMALL && pin[p]==NIL ->                                                   /* sh_alloc_fast */
       lock(O(p),p);
       if
       :: STILL_MINE ->
          if :: b=0 :: b=1 fi;
          atomic { word(b); if :: st[b]==FREE -> come_alive(b); assert(ALIVE(b)); ok=1 :: else fi };
          if :: ok -> atomic { pin[p]=b; pg[p]=gen[b] } :: else fi
       :: else
       fi;
       unlock(O(p))
    :: sp[0]==MY_SMALL && (st[0]==HOLE || st[1]==HOLE) ->                                  /* fill */
       lock(O(p),p);
       if
       :: sp[0]==MY_SMALL ->
          u=0;
          do
          :: u<NP -> atomic { if :: un[u]==COMMITTED -> stamp[u]=0
                                 :: un[u]==RELEASED -> n=n|(1<<u);
#ifndef BUG_NO_URESERVED
                                    un[u]=URESERVED
#endif
                                 :: else fi; u++ }
          :: else -> break
          od;
          unlock(O(p));
          u=0;
          do
          :: u<NP -> if :: n&(1<<u) -> if :: kern[u]=1; b=b|(1<<u)                                    /* b: the units that it got */
#ifdef NOSPC
                                          :: kern[u]=1; kern[u]=0
#endif
                                       fi :: else fi; u++
          :: else -> break
          od;
          lock(O(p),p);
          u=0;
          do
          :: u<NP -> atomic { if :: n&(1<<u) ->
                                    assert(IS_SMALL(sp[0]));       /* nobody else's before this is done */
#ifndef BUG_NO_URESERVED
                                    assert(un[u]==URESERVED);
#endif
                                    un[u]=(b&(1<<u) -> COMMITTED : RELEASED) :: else fi; u++ }
          :: else -> break
          od;
#ifdef BUG_FILL_NO_LOOK
          wake(0); wake(1)
#else
          if :: sp[0]==MY_SMALL -> wake(0); wake(1) :: else fi
#endif
       :: else
       fi;
       unlock(O(p))
    :: sp[0]==MY_SMALL && EMPTY ->                                                         /* sh_pspan_push: an empty span */
       lock(O(p),p);
       if
       :: sp[0]==MY_SMALL && EMPTY && AT_REST ->
          atomic { keep_small() }; sp[0]=MY_RESERVED;
          unlock(O(p));
          put(p,0,2,MY_RESERVED)
       :: else -> unlock(O(p))
       fi
    :: pin[p]!=NIL && !(wire==ADDRESS(pin[p]) && wg==pg[p]) -> atomic { wire=ADDRESS(pin[p]); wg=pg[p] }     /* pickle */
    :: wire!=NIL && pin[p]==NIL ->                                                         /* look a handle up: sh_adopt */
       lock(O(p),p);
       atomic { b=wire; g=wg; w=sp[b] };                                                   /* span_of_page */
       if :: w==INNER -> w=sp[0]; if :: IS_SMALL(w) :: else -> w=SFREE fi :: else fi;
       if
       :: IS_SMALL(w) || w==LARGE ->
          b=(w==LARGE -> b+2 : b);
          atomic { word(b); if :: st[b]==LIVE && gen[b]==g -> cnt[b]=cnt[b]+1; tch[b]=1; ok=1 :: else fi };
          if :: ok -> atomic { assert(ALIVE(b)); assert(USABLE(b)); pin[p]=b; pg[p]=g } :: else fi
       :: else
       fi;
       unlock(O(p))
#ifdef CELLS
    :: (sp[0]==MY_CELL || sp[1]==MY_CELL) ->                                               /* write a lease, or clear a pin */
       if :: k=0 :: k=1 fi;
       lock(O(p),p);
       if
       :: sp[k]==MY_CELL && !cell[k] -> atomic { assert(OK_UNIT(k)); cell[k]=1; lwire=k }
       :: sp[k]==MY_CELL && cell[k] -> cell[k]=0
       :: else
       fi;
       unlock(O(p))
    :: (sp[0]==MY_CELL || sp[1]==MY_CELL) ->                                               /* give cells back */
       if :: k=0 :: k=1 fi;
       lock(O(p),p);
       if
       :: sp[k]==MY_CELL && !cell[k] -> sp[k]=MY_RESERVED; unlock(O(p)); put(p,k,1,MY_RESERVED)
       :: else -> unlock(O(p))
       fi
    :: lwire!=NIL ->                                                                       /* take_lease */
       lock(O(p),p);
       k=lwire; ok=IS_CELL(sp[k]);
       if
       :: ok -> assert(kern[k]);                                   /* the cell is read: a hole must not be */
          atomic { if :: IS_CELL(sp[k]) && cell[k] -> cell[k]=0 :: else fi }   /* its value is of that lease alone */
       :: else
       fi;
       unlock(O(p))
#endif
    fi;
    forget()
  :: else -> break
  od
  } unless { dead[p] };
  atomic {                                                       /* the kernel: held locks are orphaned, then liveness goes */
    if :: pl[O(p)]==1+p -> pl[O(p)]=ORPHANED :: else fi;
    if :: hl==1+p -> hl=ORPHANED :: else fi;
    k=0; n=0; need=0; b=0; g=0; u=0; w=0; ok=0; won=0; c=0; done[p]=1 }
}

/* ---- the collector -------------------------------------------------------------------------------------------------- */
inline handshake() {                /* whatever ran under a process lock when this began is over */
  atomic { (pl[0]==0 || pl[0]==ORPHANED) -> pl[0]=0 };
  atomic { (pl[1]==0 || pl[1]==ORPHANED) -> pl[1]=0 }
}
#ifdef BUG_PUNCH_NO_HANDSHAKE
#define free_handshake() skip
#else
#define free_handshake() handshake()
#endif
#ifdef BUG_HOLE_NO_HANDSHAKE
#define hole_handshake() skip
#else
#define hole_handshake() handshake()
#endif
#ifdef BUG_REAP_NO_HANDSHAKE
#define reap_handshake() skip
#else
#define reap_handshake() handshake()
#endif
#ifdef BUG_BEGIN_NO_HANDSHAKE
#define begin_handshake() skip
#else
#define begin_handshake() handshake()
#endif
inline punch(u_) {                  /* punch_all; the books say URELEASING from before until after */
  atomic { assert(un[u_]==URELEASING); assert(UNUSED(u_)); kern[u_]=0 };
  atomic { assert(un[u_]==URELEASING && !kern[u_]); un[u_]=RELEASED; stamp[u_]=0 }
}
inline redo(u_) { un[u_]=URELEASING; punch(u_) }

inline give_all() {                 /* runs put aside: after sh_begin, whatever has the collector's name is this collector's */
  k=0;
  do
  :: k<NP -> if :: sp[k]==RESERVED(COLL) || sp[k]==RELEASING -> w=sp[k]; n=PAGES(k); put(COLL,k,n,w) :: else fi; k++
  :: else -> break
  od
}
/* RESERVED by the dead: all of it is punched.  RELEASING by a dead collector: what was begun is done again. */
inline finish_run(hard_) {
  n=PAGES(k); sp[k]=RELEASING;
#ifndef BUG_NO_REDO
  u=k;
  do :: u<k+n -> if :: BUSY(u) || (hard_ && un[u]==COMMITTED) -> redo(u) :: else fi; u++ :: else -> break od
#endif
}
inline make_orphan() { atomic { HFREE -> recover_h(); hl=1+COLL; log_h(0,2); sp[0]=SMALL(NONE) }; hunlock() }
/* A small span whose owner is dead: what is half done is undone; then empty ones go back, others become orphans. */
inline end_small() {
#ifndef BUG_END_NO_PUNCH
  u=0;
  do :: u<NP -> if :: BUSY(u) -> redo(u) :: else fi; u++ :: else -> break od;
#endif
  if :: EMPTY -> atomic { keep_small() }; sp[0]=RELEASING :: else -> make_orphan() fi
}

/* sh_begin: what an earlier collector was in the middle of. */
inline begin() {
  begin_handshake();
#ifndef BUG_NO_BEGIN
  k=0;
  do
  :: k<NP ->
     look(k,w);
     if
     :: w==SMALL(COLL) -> end_small()
     :: IS_SMALL(w) && w!=SMALL(COLL) -> u=0; do :: u<NP -> if :: un[u]==URELEASING -> punch(u) :: else fi; u++ :: else -> break od
     :: w==RESERVED(COLL) -> finish_run(true)
     :: w==RELEASING -> finish_run(false)
     :: else
     fi;
     k++
  :: else -> break
  od;
  give_all()
#endif
}

/* sh_hold_small: an owned span is guarded by its owner's lock; an orphan the collector makes its own for that while. */
inline guard(k_) {                   /* w: the record seen */
  look(k_,w); ok=0;
  if
  :: w==SMALL(0) || w==SMALL(1) || w==CELL(0) || w==CELL(1) -> lock(w%8,COLL); if :: sp[k_]==w -> ok=1 :: else -> unlock(w%8) fi
  :: w==SMALL(NONE) ->
     atomic { HFREE -> recover_h(); if :: sp[0]==w -> hl=1+COLL; log_h(0,2); sp[0]=SMALL(COLL); ok=1 :: else -> hl=0 fi };
     if :: ok -> hunlock() :: else fi
  :: else
  fi
}
inline let_go() {                   /* sh_let_small, or sh_let_owner where the span is no small span any more */
  if
  :: w==SMALL(NONE) -> if :: sp[0]==SMALL(COLL) -> make_orphan() :: else fi
  :: else -> unlock(w%8)
  fi
}
inline unpin(x_) {                  /* drop_cell */
  atomic { b=pin[x_]; g=pg[x_]; pin[x_]=NIL; pg[x_]=0 };
  if
  :: b!=NIL -> count_down(b,g); if :: won && b>=2 -> atomic { keep_large(b-2) }; sp[b-2]=RESERVED(COLL) :: else fi
  :: else
  fi
}
inline reap(x_) {                   /* sh_reap: first what the process held, then what it owned */
  unpin(x_);
#ifdef THREADS
  unpin(1); reaped[1]=1;
#endif
  k=0;
  do
  :: k<NP -> look(k,w); if :: w==CELL(O(x_)) -> cell[k]=0; sp[k]=RELEASING :: else fi; k++
  :: else -> break
  od;
  give_all();
  reap_handshake();
  k=0;
  do
  :: k<NP ->
     look(k,w);
     if
     :: w==RESERVED(O(x_)) -> finish_run(true)
     :: w==SMALL(O(x_)) -> end_small()
     :: else
     fi;
     k++
  :: else -> break
  od;
  give_all();
  reaped[x_]=1
}
inline sweep_word(x_) {             /* what gc.pml allows */
  atomic { won=0;
    if :: st[x_]==LIVE && !HELD(x_) && !tch[x_] -> word(x_); st[x_]=FREE; cnt[x_]=0; gen[x_]=gen[x_]+1; won=1 :: else fi }
}
inline sweep() {
  atomic { tch[0]=0; tch[1]=0; tch[2]=0; tch[3]=0 }; handshake();   /* all that gc.pml does before SWEEP */
  k=0;
  do
  :: k<NP ->
     look(k,w);
     if
     :: w==LARGE ->
        sweep_word(k+2);
        if
        :: won -> atomic { assert(sp[k]==LARGE); keep_large(k) }; sp[k]=RESERVED(COLL)
        :: else ->
           atomic { ok=(st[k+2]!=LIVE); g=gen[k+2] };              /* suspect */
           if :: ok -> ok=(sp[k]==LARGE) :: else fi;
           if
           :: ok ->                                                /* judge_suspects */
#ifndef BUG_JUDGE_NO_HANDSHAKE
              handshake();
#endif
#ifdef BUG_JUDGE_WORD_FIRST
              ok=(st[k+2]==FREE && gen[k+2]==g);
              if :: ok -> ok=(sp[k]==LARGE) :: else fi;
#else
              ok=(sp[k]==LARGE);                                   /* the record first: it was written after the word */
              if :: ok -> ok=(st[k+2]==FREE && gen[k+2]==g) :: else fi;
#endif
#ifndef BUG_JUDGE_KEEP_LATE
              if :: ok -> atomic { assert(sp[k]==LARGE); keep_large(k) } :: else fi;   /* before RELEASING, which a successor gives back */
#endif
              if :: ok -> atomic { if :: sp[k]==LARGE -> assert(st[k+2]!=LIVE); sp[k]=RELEASING :: else -> ok=0 fi } :: else fi;
#ifdef BUG_JUDGE_KEEP_LATE
              if :: ok -> atomic { keep_large(k) } :: else fi
#endif
           :: else
           fi
        fi
     :: IS_SMALL(w) -> sweep_word(0); sweep_word(1)
     :: else
     fi;
     k++
  :: else -> break
  od;
  give_all()
}
inline end_span() {                 /* and end_cells */
  guard(k);
  if
  :: ok ->
     if
     :: w<24 && EMPTY && AT_REST -> atomic { keep_small() }; sp[k]=RELEASING
#ifndef BUG_CELLS_UNSEEN
     :: w>=24 && !cell[k] && !BUSY(k) -> sp[k]=RELEASING
#else
     :: w>=24 && !BUSY(k) -> sp[k]=RELEASING
#endif
     :: else
     fi;
     let_go();
     give_all()
  :: else
  fi
}
inline aside(x_) { atomic { if :: COVERS(x_,u) && st[x_]==FREE -> word(x_); st[x_]=HOLE :: else fi } }

#define REAP0 0
#define REAP1 1
#define SWEEP 2
#define END 3                       /* an empty small span goes back; or cells that hold nothing */
#define STAMP 5                     /* FREE blocks of a wholly free unit become HOLE, and the unit ages */
#define PUNCH_HOLE 6                /* a stamped unit all of whose blocks are set aside */
#define RELEASE 7                   /* a free run */
#define NOTHING 8
#if defined(BUG_ASIDE_NO_LOCK)
#define HOLDS false                 /* nobody is locked out while blocks are set aside */
#elif defined(BUG_ORPHAN_NO_LOCK)
#define HOLDS (sp[0]!=SMALL(NONE))  /* an orphan is worked on without being taken */
#else
#define HOLDS true
#endif
#ifdef BUG_PUNCH_NOT_ASIDE
#define PUNCHABLE NONE_LIVES(u)
#else
#define PUNCHABLE (stamp[u] && ALL_HOLES(u))
#endif
#define QUIET kdone

proctype coll() {
  byte a, act, step, k, n, need, b, g, u, w; bit ok, won, fresh, locked;
  do
  :: {
  do
  :: fresh -> begin();
     atomic { fresh=0; k=0; n=0; need=0; b=0; g=0; u=0; w=0; ok=0; won=0 }
  :: atomic { !fresh && a<ACTS && !QUIET -> a++;
       if :: act=REAP0 :: act=REAP1 :: act=SWEEP :: act=END :: act=STAMP :: act=STAMP; u=1 :: act=PUNCH_HOLE
          :: act=PUNCH_HOLE; u=1 :: act=RELEASE; need=1 :: act=RELEASE; need=2
#ifdef CELLS
          :: act=END; k=1
#endif
#ifdef BUG_STAMP_PLAIN
          :: act=NOTHING; u=0 :: act=NOTHING; u=1
#endif
       fi };
     goto work
  :: atomic { !fresh && QUIET && step<10 -> a=ACTS; act=step%5; k=0; step++;       /* closing: reap, sweep, give back; twice */
       if :: act==4 -> act=END; k=1 :: else fi };
work:
     if
     :: act==REAP0 -> if :: GONE(0) && !reaped[0] -> reap(0) :: else fi
     :: act==REAP1 -> if :: GONE(1) && !reaped[O(1)] -> reap(O(1)) :: else fi
     :: act==SWEEP -> sweep()
     :: act==END -> end_span()
     :: act==STAMP && IS_SMALL(sp[0]) ->                               /* stamp_small */
        locked=HOLDS;
        if :: locked -> guard(0) :: else -> ok=1 fi;
        if
        :: ok && un[u]==COMMITTED && !stamp[u] && NONE_LIVES(u) -> aside(0); aside(1); stamp[u]=1
        :: else
        fi;
        if :: locked && ok -> let_go() :: else fi
     :: act==PUNCH_HOLE && IS_SMALL(sp[0]) ->                          /* claim_small_units, release_claimed */
        locked=HOLDS;
        if :: locked -> guard(0) :: else -> w=sp[0]; ok=1 fi;
        if
        :: ok && un[u]==COMMITTED && PUNCHABLE -> un[u]=URELEASING; if :: locked -> let_go() :: else fi;
           hole_handshake(); punch(u)
        :: else -> if :: locked && ok -> let_go() :: else fi
        fi
     :: act==RELEASE ->                                                /* take_batch, claim_free_units, release_claimed */
        take(COLL,RELEASING);
        if
        :: n!=0 ->
           u=k;
           do :: u<k+n -> if :: un[u]==COMMITTED -> un[u]=URELEASING :: else fi; u++ :: else -> break od;
           free_handshake();
           u=k;
           do :: u<k+n -> if :: un[u]==URELEASING -> punch(u) :: else fi; u++ :: else -> break od;
           atomic { wp[k]=1; if :: n==2 -> wp[1]=1 :: else fi };      /* release_words */
           put(COLL,k,n,RELEASING)
        :: else
        fi
#ifdef BUG_STAMP_PLAIN
     :: act==NOTHING -> w=un[u]; un[u]=w                               /* age and state share a word: stamped without the lock */
#endif
     :: else
     fi;
     atomic { act=0; k=0; n=0; need=0; b=0; g=0; u=0; w=0; ok=0; won=0; locked=0 }
  :: !fresh && step==10 -> goto fin
  od
  } unless { ckill -> atomic {
       ckill=0;
       if :: pl[0]==1+COLL -> pl[0]=ORPHANED :: else fi;
       if :: pl[1]==1+COLL -> pl[1]=ORPHANED :: else fi;
       if :: hl==1+COLL -> hl=ORPHANED :: else fi;
       act=0; step=0; k=0; n=0; need=0; b=0; g=0; u=0; w=0; ok=0; won=0; locked=0; fresh=1 } }
  od;
fin: skip;
  d_step {
    k=0;
    do
    :: k<NP ->
       assert(un[k]==COMMITTED || un[k]==RELEASED);                    /* nothing is half done */
       assert(kern[k]==(un[k]==COMMITTED));                           /* I-10 */
       assert(sp[k]==SFREE || sp[k]==LARGE || IS_SMALL(sp[k]) || IS_CELL(sp[k]) || (k==1 && sp[k]==INNER));  /* none is lost */
       assert(onlist[k]==(sp[k]==SFREE));                             /* nor lost to the free lists */
       if
       :: sp[k]==LARGE -> assert(st[k+2]==LIVE && HELD(k+2))
       :: k==0 && IS_SMALL(sp[k]) -> assert(TWO); assert(!wp[0] && !wp[1]); assert(!EMPTY); assert(sp[k]!=SMALL(COLL));
          assert(sp[k]==SMALL(NONE) || !GONE(sp[k]%8));
          assert(!(st[0]==LIVE) || (HELD(0) && USABLE(0))); assert(!(st[1]==LIVE) || (HELD(1) && USABLE(1)))
       :: IS_CELL(sp[k]) -> assert(cell[k] && !GONE(sp[k]%8) && OK_UNIT(k))
       :: k==1 && sp[k]==INNER -> assert(sp[0]==LARGE || IS_SMALL(sp[0]))
       :: else
       fi;
       k++
    :: else -> break
    od
  }
}

proctype killer() {
  byte k, ck;
  do
#ifdef THREADS
  :: atomic { k<KILLS && !dead[0] && !(done[0] && done[1]) -> k++; dead[0]=1; dead[1]=1 }
#else
  :: k<KILLS && !dead[0] && !done[0] -> k++; dead[0]=1
  :: k<KILLS && !dead[1] && !done[1] -> k++; dead[1]=1
#endif
  :: ck<CKILLS && ckill==0 -> ck++; ckill=1
  :: atomic { done[0] && done[1] && ckill==0 -> k=0; ck=0; kdone=1; break }       /* earlier, it would only kill less */
  od
}

#define LIVE_WORD(w,n) st[w]=LIVE; cnt[w]=n
#define DATA(u) un[u]=COMMITTED; kern[u]=1
#define SMALL_SPAN(o) sp[0]=SMALL(o); sp[1]=INNER; wire=0
#define START(i) (INIT==(i) || INIT==9)
init {
  atomic {
    pin[0]=NIL; pin[1]=NIL; wire=NIL; lwire=NIL;
    if
    :: START(0) -> onlist[0]=1; onlist[1]=1; DATA(0); wp[1]=1                           /* all free: page 0 data, page 1 a hole */
    :: START(1) -> sp[0]=LARGE; DATA(0); LIVE_WORD(2,2); pin[0]=2; pin[1]=2; wire=0; onlist[1]=1; wp[1]=1        /* two pins */
    :: START(2) -> SMALL_SPAN(0); DATA(0); DATA(1); LIVE_WORD(0,1); pin[1]=0            /* worker 0's span, 1 holds a block of it */
    :: START(3) -> SMALL_SPAN(0); DATA(0); LIVE_WORD(0,1); pin[1]=0; st[1]=HOLE         /* the same, unit 1 a hole */
    :: START(4) -> SMALL_SPAN(0); DATA(0); DATA(1); LIVE_WORD(0,1); pin[1]=0; st[1]=HOLE; stamp[1]=1    /* unit 1 is ageing */
    :: START(5) -> SMALL_SPAN(NONE); DATA(0); DATA(1); LIVE_WORD(0,1); pin[1]=0; st[1]=HOLE; stamp[1]=1 /* an orphan of that kind */
    :: START(6) -> sp[0]=LARGE; sp[1]=INNER; DATA(0); DATA(1); LIVE_WORD(2,1); pin[0]=2; wire=0         /* a large block of two pages */
    :: START(7) -> SMALL_SPAN(0); DATA(0); DATA(1); LIVE_WORD(0,1); pin[0]=0            /* worker 0's span, it holds a block of it */
    :: INIT==8 -> sp[0]=CELL(0); DATA(0); lwire=0; onlist[1]=1; wp[1]=1                 /* worker 0's cells, where a lease was */
    fi
  };
  atomic { run worker(0); run worker(1); run coll(); run killer() }
}
