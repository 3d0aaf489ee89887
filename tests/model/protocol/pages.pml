/* shmheap, DESIGN.md sections 3, 5 and 6: spans, OS pages (units) and block words, with deaths anywhere.
 *
 * gc.pml shows that counts, leases and the tracing collector agree.  This model takes that for granted (a collection may free
 * whatever was unheld when it began) and asks about the layer below: can a page be handed out twice, punched under somebody,
 * given back twice, or lost?
 *
 * Two workers, a collector with successors, a killer.  Every statement outside atomic{} is one interleaving point; atomic{}
 * is one atomic instruction on one shared word, work under a lock that nobody else can see, or ghost work.
 *
 * The heap has two pages of one unit each.  A span is page 0, page 1, or both.  Block word i belongs to page i whatever the
 * page is cut into, so a stale handle (i, generation) meets every later use of its page.  The one small class has two blocks
 * in a two-page span: block i in unit i, or with -DGEOM=1 block 1 lies across both units.
 *
 * Knobs (-D): OPS operations per worker; ACTS free actions of the collector before its closing collections; KILLS and CKILLS
 * deaths of workers and of collectors; INIT the start state (9: any, see init); GEOM; THREADS (the two workers are threads of
 * one process); PLOG (process locks undo span words, too); NOSPC (fallocate may fail); BUG_x breaks one rule. */
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

#define NP 2
#define NIL 7
#define COLL 2                      /* owner names: workers 0 and 1, the collector, nobody */
#define NONE 3
#define ORPHANED 9                  /* a robust lock whose holder died */

/* block word */
#define FREE 0
#define LIVE 1
#define HOLE 2                      /* free, set aside: its unit may be a hole */
/* unit */
#define RELEASED 0
#define COMMITTED 1
#define URESERVED 2                 /* being committed by the span's owner */
#define URELEASING 3                /* being punched by the collector */
/* span word, of the span's first page */
#define SFREE 0
#define LARGE 1
#define INNER 2                     /* second page of a span */
#define RELEASING 3                 /* the collector's */
#define RESERVED(o) (8+(o))
#define SMALL(o) (16+(o))
#define IS_SMALL(w) ((w)>=16)
#define IS_LARGE(w) ((w)==LARGE)

byte sp[NP];                        /* span words */
bit onlist[NP];                     /* the page is on a free list */
byte un[NP];                        /* unit states */
bit kern[NP];                       /* what the kernel holds: 1 data, 0 hole */
bit wpunched[NP];                   /* the metadata page of block word i is a hole */
byte st[NP], gen[NP], cnt[NP];      /* block words */

byte pin[2]; byte pg[2];            /* one pin per worker */
bit tch[NP];                        /* counted up since the collection began */
byte wire; byte wg;                 /* pickled bytes: live for ever */

byte pl[2];                         /* process locks: 0, 1 + holder, or ORPHANED */
byte plog[2]; byte pold[2];         /* with -DPLOG its undo log: 1 + page, old span word */
byte hl;                            /* the heap lock */
byte hn, hi, hold;                  /* its undo log: pages (0 = empty), first page, old span word */

bit dead[2], done[2], reaped[2]; bit kdone, ckill;

/* ---- what a block lies on ------------------------------------------------------------------------------------------- */
#define TWO (sp[1]==INNER)          /* pages 0 and 1 are one span */
#if GEOM==1
#define COVERS(b,u) ((b)==(u) || ((b)==1 && (u)==0 && TWO && IS_SMALL(sp[0])) || ((b)==0 && (u)==1 && TWO && !IS_SMALL(sp[0])))
#else
#define COVERS(b,u) ((b)==(u) || ((b)==0 && (u)==1 && TWO && !IS_SMALL(sp[0])))
#endif
#define OK_UNIT(u) (un[u]==COMMITTED && kern[u])
#define USABLE(b) ((!COVERS(b,0) || OK_UNIT(0)) && (!COVERS(b,1) || OK_UNIT(1)))
#define ALL_IN(b) ((!COVERS(b,0) || un[0]==COMMITTED) && (!COVERS(b,1) || un[1]==COMMITTED))
#ifdef BUG_STRADDLE
#define WAKEABLE(b,u) (un[u]==COMMITTED && COVERS(b,u))
#else
#define WAKEABLE(b,u) ALL_IN(b)
#endif
#define UNUSED(u) (!(st[0]==LIVE && COVERS(0,u)) && !(st[1]==LIVE && COVERS(1,u)))
#define UNIT_ALL_HOLES(u) ((!COVERS(0,u) || st[0]==HOLE) && (!COVERS(1,u) || st[1]==HOLE))
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
#define PINNED(p,b) (!reaped[p] && pin[p]==(b) && pg[p]==gen[b])
#define HELD(b) (PINNED(0,b) || PINNED(1,b))

/* ---- locks ---------------------------------------------------------------------------------------------------------- */
inline recover_p(p_) {               /* the taker of an orphaned lock rolls the unfinished operation back */
  if :: pl[p_]==ORPHANED && plog[p_]!=0 -> sp[plog[p_]-1]=pold[p_] :: else fi; plog[p_]=0; pold[p_]=0
}
inline recover_h() {
  if
  :: hl==ORPHANED && hn!=0 ->
     sp[hi]=hold;
     if :: hold==SFREE -> onlist[hi]=1; if :: hn==2 -> sp[1]=SFREE; onlist[1]=1 :: else fi
        :: else -> onlist[hi]=0; if :: hn==2 -> sp[1]=INNER; onlist[1]=0 :: else fi
     fi
  :: else
  fi;
  hn=0; hi=0; hold=0
}
inline lock(p_,me_) { atomic { (pl[p_]==0 || pl[p_]==ORPHANED) -> recover_p(p_); pl[p_]=1+me_ } }
inline unlock(p_) { atomic { plog[p_]=0; pold[p_]=0; pl[p_]=0 } }
#ifdef PLOG
inline set_span(p_,k_,w_) { atomic { plog[p_]=k_+1; pold[p_]=sp[k_]; sp[k_]=w_ } }
#else
inline set_span(p_,k_,w_) { sp[k_]=w_ }
#endif
#define HFREE (hl==0 || hl==ORPHANED)
inline log_h(k_,n_) { hi=k_; hn=n_; hold=sp[k_] }
#ifdef BUG_LOOK_UNLOCKED
#define look(k,w_) w_=sp[k]
#else
#define look(k,w_) atomic { HFREE -> recover_h(); hl=0; w_=sp[k] }   /* never what an unfinished operation wrote */
#endif
inline hunlock() { atomic { hn=0; hi=0; hold=0; hl=0 } }

/* ---- free lists, under the heap lock: one step that changes, one that commits ------------------------------------------ */
inline take(me_,w_) {               /* need: 1 or 2 pages; k: first page, n: pages, n = 0: none */
  atomic { HFREE -> recover_h();
    if
    :: need==1 && onlist[0] -> k=0; n=1
    :: need==1 && onlist[1] -> k=1; n=1
    :: need==2 && onlist[0] && onlist[1] -> k=0; n=2
    :: (need==1 && !onlist[0] && !onlist[1]) || (need==2 && !(onlist[0] && onlist[1])) -> n=0
    fi;
    if
    :: n!=0 ->
       assert(sp[k]==SFREE && (n==1 || sp[1]==SFREE));            /* what a list holds is free: no double ownership */
       hl=1+me_; log_h(k,n); sp[k]=w_; onlist[k]=0;
       if :: n==2 -> sp[1]=INNER; onlist[1]=0 :: else fi
    :: else -> hl=0
    fi };
  if :: n!=0 -> hunlock() :: else fi
}
inline put(me_,k_,n_,w_) {              /* the span goes back: merge with the neighbour is implied */
  atomic { HFREE -> recover_h();
    assert(sp[k_]==w_ && (n_==1 || sp[1]==INNER));                /* no double free of a span */
    assert(!onlist[k_] && (n_==1 || !onlist[1]));
    assert(!BUSY(k_) && (n_==1 || !BUSY(1)));
    hl=1+me_; log_h(k_,n_); sp[k_]=SFREE; onlist[k_]=1;
    if :: n_==2 -> sp[1]=SFREE; onlist[1]=1 :: else fi };
  hunlock()
}
#define PAGES(k) (((k)==0 && TWO) -> 2 : 1)

/* ---- block words ---------------------------------------------------------------------------------------------------- */
inline word(b_) { assert(!wpunched[b_]) }                             /* every access to a block word or its hint bit */
inline count_down(b_,g_) {            /* the CAS; won: this was the last */
  atomic { word(b_); won=0;
    if :: st[b_]==LIVE && gen[b_]==g_ -> cnt[b_]=cnt[b_]-1;
            if :: cnt[b_]==0 -> st[b_]=FREE; gen[b_]=gen[b_]+1; won=1 :: else fi
       :: else fi }
}
inline punch(u_) { atomic { assert(UNUSED(u_)); kern[u_]=0 } }

/* ---- workers -------------------------------------------------------------------------------------------------------- */
#define MY_SMALL SMALL(O(p))
#define MY_RESERVED RESERVED(O(p))
inline commit(u_) {                 /* I-5; the span is RESERVED by this process, so nobody else looks at its units */
  if
  :: un[u_]==RELEASED -> kern[u_]=1; un[u_]=COMMITTED
#ifdef NOSPC
  :: un[u_]==RELEASED -> ok=0
#endif
  :: else -> assert(un[u_]==COMMITTED)
  fi
}
inline wake(b_) { atomic { if :: st[b_]==HOLE && WAKEABLE(b_,u) -> word(b_); st[b_]=FREE :: else fi } }
inline forget() { atomic { k=0; n=0; need=0; b=0; g=0; u=0; w=0; ok=0; won=0 } }
inline claim(b_) { st[b_]=LIVE; cnt[b_]=1; tch[b_]=1; assert(USABLE(b_)) }

#ifdef BUG_GEN_RESTART
#define FRESH_WORD(b) gen[b]=0      /* words come back from a hole as zeros, no watermark */
#else
#define FRESH_WORD(b) skip
#endif
#ifdef BUG_ALLOC_NO_CHECK
#define STILL_MINE true             /* X trusts its list and does not look at the span word again */
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
    :: atomic { pin[p]==NIL -> w=LARGE; if :: need=1 :: need=2 fi }; goto alloc_span       /* allocate a large block */
    :: atomic { w=MY_SMALL; need=2 };                                                      /* cut a small span */
alloc_span:
       take(p,MY_RESERVED);
       if
       :: n!=0 ->
          ok=1;
          atomic { wpunched[k]=0; FRESH_WORD(k); if :: n==2 -> wpunched[1]=0; FRESH_WORD(1) :: else fi };
          commit(k);
          if :: n==2 && ok -> commit(1) :: else fi;
          if
          :: ok && w==LARGE ->
             lock(O(p),p);
#ifdef BUG_LARGE_FIRST
             set_span(O(p),k,LARGE);
             atomic { word(k); claim(k) };
#else
             atomic { word(k); assert(st[k]!=LIVE); claim(k) };    /* the block word first: LARGE is never over a FREE word ... */
             assert(sp[k]==MY_RESERVED);
             set_span(O(p),k,LARGE);                               /* ... but between a last free and its next step */
#endif
             atomic { assert(st[k]==LIVE); pin[p]=k; pg[p]=gen[k] };
             unlock(O(p))
          :: ok && w!=LARGE ->
             lock(O(p),p);
             atomic { word(0); word(1); assert(EMPTY); st[0]=FREE; st[1]=FREE };
             set_span(O(p),0,MY_SMALL);
             unlock(O(p))
          :: else -> put(p,k,n,MY_RESERVED)
          fi
       :: else
       fi
    :: pin[p]!=NIL ->                                                                      /* drop the pin */
       lock(O(p),p);
       atomic { b=pin[p]; g=pg[p]; assert(st[b]==LIVE && gen[b]==g); assert(USABLE(b)); w=sp[b] };
       atomic { pin[p]=NIL; pg[p]=0 };
       count_down(b,g);
       if
       :: won && w==LARGE ->
#ifdef BUG_LIST_FIRST
          put(p,b,PAGES(b),LARGE); sp[b]=MY_RESERVED; unlock(O(p))
#else
          atomic { assert(sp[b]==LARGE); n=PAGES(b) };
          set_span(O(p),b,MY_RESERVED);
          unlock(O(p));
          put(p,b,n,MY_RESERVED)
#endif
       :: won && w!=LARGE -> word(b); unlock(O(p))                                         /* the hint bit */
       :: !won -> unlock(O(p))
       fi
    :: sp[0]==SMALL(NONE) ->                                                               /* adopt an orphan */
       atomic { HFREE -> recover_h();
         if :: sp[0]==SMALL(NONE) -> hl=1+p; log_h(0,2); sp[0]=MY_SMALL; ok=1 :: else -> hl=0 fi };
       if :: ok -> hunlock() :: else fi;
       if
#ifdef BUG_ADOPT_RESTORES
       :: ok -> lock(O(p),p); sp[0]=MY_SMALL; unlock(O(p))       /* says again what may have changed since */
#endif
       :: else
       fi
    :: sp[0]==MY_SMALL && pin[p]==NIL ->                                                   /* allocate a small block */
       lock(O(p),p);
       if
       :: STILL_MINE ->
          if :: b=0 :: b=1 fi;
          atomic { word(b); if :: st[b]==FREE -> claim(b); ok=1 :: else fi };
          if :: ok -> atomic { pin[p]=b; pg[p]=gen[b] } :: else fi
       :: else
       fi;
       unlock(O(p))
    :: sp[0]==MY_SMALL && (st[0]==HOLE || st[1]==HOLE) ->                                  /* refill from a unit */
       if :: u=0 :: u=1 fi;
       lock(O(p),p);
       if
       :: sp[0]==MY_SMALL && un[u]==RELEASED ->
#ifndef BUG_NO_URESERVED
          un[u]=URESERVED;
#endif
          unlock(O(p));
          if :: kern[u]=1; ok=1
#ifdef NOSPC
             :: ok=0
#endif
          fi;
          lock(O(p),p);
#ifndef BUG_NO_URESERVED
          assert(sp[0]==MY_SMALL && un[u]==URESERVED);
#endif
          if :: ok -> un[u]=COMMITTED; wake(0); wake(1) :: else -> un[u]=RELEASED fi
       :: sp[0]==MY_SMALL && un[u]==COMMITTED -> wake(0); wake(1)
       :: else
       fi;
       unlock(O(p))
    :: sp[0]==MY_SMALL && EMPTY ->                                                         /* return an empty span */
       lock(O(p),p);
       if
       :: sp[0]==MY_SMALL && EMPTY && AT_REST ->
          set_span(O(p),0,MY_RESERVED);
          unlock(O(p));
          put(p,0,2,MY_RESERVED)
       :: else -> unlock(O(p))
       fi
    :: pin[p]!=NIL && wire!=pin[p] -> atomic { wire=pin[p]; wg=pg[p] }                     /* pickle */
    :: wire!=NIL && pin[p]==NIL ->                                                         /* look a handle up */
       lock(O(p),p);
       atomic { b=wire; g=wg; w=sp[b] };
       if :: w==INNER -> w=sp[0]; if :: !IS_SMALL(w) -> w=SFREE :: else fi :: else fi;
       if
       :: IS_SMALL(w) || w==LARGE ->
          if
          :: atomic { word(b); if :: st[b]==LIVE && gen[b]==g -> cnt[b]=cnt[b]+1; tch[b]=1; ok=1 :: else fi };
             if :: ok -> atomic { assert(USABLE(b)); pin[p]=b; pg[p]=g } :: else fi
          :: atomic { word(b); if :: st[b]==LIVE && gen[b]==g -> ok=1 :: else fi };        /* only looks at its bytes: */
             if :: ok -> assert(kern[b]) :: else fi                                        /* a hole must not be read */
          fi
       :: else
       fi;
       unlock(O(p))
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
inline handshake() {                /* whatever ran under a process lock when this began is over, or rolled back */
  atomic { (pl[0]==0 || pl[0]==ORPHANED) -> recover_p(0); pl[0]=0 };
  atomic { (pl[1]==0 || pl[1]==ORPHANED) -> recover_p(1); pl[1]=0 }
}
inline settle() { atomic { HFREE -> recover_h(); hl=0 } }         /* the same for the heap lock */
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
#ifdef BUG_DEAD_NO_HANDSHAKE
#define dead_handshake() skip
#else
#define dead_handshake() handshake()
#endif
inline punch_unit(u_) { atomic { assert(UNUSED(u_)); kern[u_]=0 }; un[u_]=RELEASED }

/* Nothing goes from RELEASING to FREE but here.  hard: the books of its units are not to be trusted (the owner died). */
inline finish() {
  n=PAGES(k);
  if
  :: !hard && !BUSY(k) && (n==1 || !BUSY(1))                       /* given back as it is: it will age */
  :: true ->
     free_handshake();
     atomic { wpunched[k]=1; if :: n==2 -> wpunched[1]=1 :: else fi };
     u=k;
     do :: u<k+n -> punch_unit(u); u++ :: else -> break od
  fi;
  put(COLL,k,n,RELEASING)
}
inline reset_word(b_) { if :: st[b_]==LIVE && !wpunched[b_] -> st[b_]=FREE; cnt[b_]=0 :: else fi }

/* An owned span is guarded by its owner's lock; an orphan the collector makes its own for that while.  w: the word seen. */
inline guard() {
  look(0,w); ok=0;
  if
  :: w==SMALL(0) || w==SMALL(1) -> lock(w-16,COLL); if :: sp[0]==w -> ok=1 :: else -> unlock(w-16) fi
  :: w==SMALL(NONE) ->
     atomic { HFREE -> recover_h(); if :: sp[0]==w -> hl=1+COLL; log_h(0,2); sp[0]=SMALL(COLL); ok=1 :: else -> hl=0 fi };
     if :: ok -> hunlock() :: else fi
  :: else
  fi
}
inline make_orphan() { atomic { HFREE -> recover_h(); hl=1+COLL; log_h(0,2); sp[0]=SMALL(NONE) }; hunlock() }
inline unguard() {
  if
  :: w==SMALL(NONE) -> if :: sp[0]==SMALL(COLL) -> make_orphan() :: else fi
  :: else -> unlock(w-16)
  fi
}
/* A small span whose owner is dead: what is half done is undone; then empty ones go back, others become orphans. */
inline end_small() {
  u=0;
#ifndef BUG_REAP_NO_PUNCH
  do :: u<NP -> if :: BUSY(u) -> un[u]=URELEASING; punch_unit(u) :: else fi; u++ :: else -> break od;
#endif
  if :: EMPTY -> sp[0]=RELEASING :: else -> make_orphan() fi
}

inline unpin(x_) {
  atomic { b=pin[x_]; g=pg[x_]; pin[x_]=NIL; pg[x_]=0 };
  if
  :: b!=NIL -> w=sp[b]; count_down(b,g); if :: won && w==LARGE -> sp[b]=RELEASING :: else fi
  :: else
  fi
}
inline reap(x_) {
#ifndef BUG_REAP_UNRECOVERED
  settle();
#endif
  dead_handshake();
  unpin(x_);
#ifdef THREADS
  unpin(1); reaped[1]=1;
#endif
  k=0;
  do
  :: k<NP ->
     if
     :: sp[k]==RESERVED(O(x_)) ->
        atomic { reset_word(k); if :: PAGES(k)==2 -> reset_word(1) :: else fi };   /* LIVE, if the death came before the span word */
        hard=1; sp[k]=RELEASING
     :: sp[k]==SMALL(O(x_)) ->
        end_small()
     :: else
     fi;
     k++
  :: else -> break
  od;
  reaped[x_]=1
}
inline sweep_block(b_) {            /* what gc.pml allows: LIVE, unheld when the collection began, not counted up since */
  atomic { won=0;
    if :: st[b_]==LIVE && !HELD(b_) && !tch[b_] -> word(b_); st[b_]=FREE; cnt[b_]=0; gen[b_]=gen[b_]+1; won=1 :: else fi }
}
inline sweep() {
  atomic { tch[0]=0; tch[1]=0 }; handshake();                     /* all that gc.pml does before SWEEP */
  k=0;
  do
  :: k<NP ->
     look(k,w);
     if
     :: w==LARGE ->
        g=gen[k]; ok=(st[k]==FREE);
        sweep_block(k);
        if
        :: won -> assert(sp[k]==LARGE); sp[k]=RELEASING
        :: !won && ok ->                                           /* LARGE over a FREE word: being freed, or lost */
#ifndef BUG_LOST_NO_HANDSHAKE
           handshake();
#endif
#ifdef BUG_LOST_WORD_FIRST
           ok=(st[k]==FREE && gen[k]==g);
           if :: ok -> atomic { if :: sp[k]==LARGE -> sp[k]=RELEASING :: else fi } :: else fi
#else
           ok=(sp[k]==LARGE);                                      /* the span word first: LARGE over one FREE word all along */
           if :: ok -> ok=(st[k]==FREE && gen[k]==g) :: else fi;
           if :: ok -> atomic { assert(sp[k]==LARGE); sp[k]=RELEASING } :: else fi
#endif
        :: else
        fi
     :: IS_SMALL(w) -> sweep_block(0); sweep_block(1)
     :: else
     fi;
     k++
  :: else -> break
  od
}
inline give_back() {
  if
  :: EMPTY && AT_REST ->
     if :: w==SMALL(NONE) -> sp[0]=RELEASING :: else -> set_span(w-16,0,RELEASING) fi
  :: else
  fi
}
inline aside_block(b_) { atomic { if :: COVERS(b_,u) && st[b_]==FREE -> word(b_); st[b_]=HOLE :: else fi } }

#define REAP0 0
#define REAP1 1
#define SWEEP 2
#define GIVE_BACK 3                 /* an empty small span */
#define ASIDE 4                     /* FREE blocks of a wholly free unit become HOLE; the unit stays committed and ages */
#define PUNCH_HOLE 6                /* a unit all of whose blocks are set aside */
#define RELEASE 8                   /* a free span */
#define NOTHING 10
#if defined(BUG_ASIDE_NO_LOCK)
#define LOCKED_ACT (act==GIVE_BACK)
#elif defined(BUG_ORPHAN_NO_LOCK)
#define LOCKED_ACT (act==GIVE_BACK || (act>GIVE_BACK && act<RELEASE && w!=SMALL(NONE)))
#else
#define LOCKED_ACT (act>=GIVE_BACK && act<RELEASE)
#endif
#ifdef BUG_PUNCH_NOT_ASIDE
#define PUNCHABLE UNUSED(u)
#else
#define PUNCHABLE UNIT_ALL_HOLES(u)
#endif
#define QUIET (kdone && done[0] && done[1])

proctype coll() {
  byte a, act, step, k, n, need, b, g, u, w; bit ok, won, hard, fresh;
  do
  :: {
  do
  :: fresh ->                                                      /* a successor first finishes what was left half done */
#ifndef BUG_BEGIN_UNRECOVERED
     settle();
#endif
     dead_handshake();
#ifndef BUG_NO_REDO
     if
     :: sp[0]==SMALL(COLL) -> end_small()
     :: else -> do :: u<NP -> if :: IS_SMALL(sp[0]) && un[u]==URELEASING -> punch_unit(u) :: else fi; u++ :: else -> break od
     fi;
#endif
     atomic { act=NOTHING; hard=1; fresh=0 };
     goto finish_all
  :: atomic { !fresh && a<ACTS && !QUIET -> a++;
       if :: act=REAP0 :: act=REAP1 :: act=SWEEP :: act=GIVE_BACK :: act=ASIDE :: act=ASIDE; u=1 :: act=PUNCH_HOLE
          :: act=PUNCH_HOLE; u=1 :: act=RELEASE; need=1 :: act=RELEASE; need=2
#ifdef BUG_STAMP_PLAIN
          :: act=NOTHING; u=0 :: act=NOTHING; u=1
#endif
       fi };
     goto work
  :: atomic { !fresh && QUIET && step<8 -> a=ACTS; act=step%4; step++ };   /* closing: reap, sweep and give back, twice */
work:
     w=sp[0]; ok=IS_SMALL(w);
     if :: LOCKED_ACT -> guard() :: else fi;
     if
     :: act==REAP0 -> if :: GONE(0) && !reaped[0] -> reap(0) :: else fi
     :: act==REAP1 -> if :: GONE(1) && !reaped[O(1)] -> reap(O(1)) :: else fi
     :: act==SWEEP -> sweep()
     :: act==GIVE_BACK && ok -> give_back(); unguard()
     :: act==ASIDE && ok ->
        if :: UNUSED(u) && un[u]==COMMITTED -> aside_block(0); aside_block(1) :: else fi;
        if :: LOCKED_ACT -> unguard() :: else fi
     :: act==PUNCH_HOLE && ok ->
        if :: PUNCHABLE && un[u]==COMMITTED -> un[u]=URELEASING :: else -> ok=0 fi;
        if :: LOCKED_ACT -> unguard() :: else fi;
        if :: ok -> hole_handshake(); punch_unit(u) :: else fi
     :: act==RELEASE -> take(COLL,RELEASING)
#ifdef BUG_STAMP_PLAIN
     :: act==NOTHING -> w=un[u]; un[u]=w                           /* age and state share a word: stamped by load and store */
#endif
     :: else
     fi;
finish_all:
     k=0;
     do :: k<NP -> if :: sp[k]==RELEASING -> finish() :: else fi; k++ :: else -> break od;
     atomic { act=0; k=0; n=0; need=0; b=0; g=0; u=0; w=0; ok=0; won=0; hard=0 }
  :: !fresh && step==8 -> goto fin
  od
  } unless { ckill -> atomic {
       ckill=0;
       if :: pl[0]==1+COLL -> pl[0]=ORPHANED :: else fi;
       if :: pl[1]==1+COLL -> pl[1]=ORPHANED :: else fi;
       if :: hl==1+COLL -> hl=ORPHANED :: else fi;
       act=0; step=0; k=0; n=0; need=0; b=0; g=0; u=0; w=0; ok=0; won=0; hard=0; fresh=1 } }
  od;
fin: skip;
  d_step {
    k=0;
    do
    :: k<NP ->
       assert(un[k]==COMMITTED || un[k]==RELEASED);
       assert(kern[k]==(un[k]==COMMITTED));                           /* I-10 */
       assert(sp[k]==SFREE || sp[k]==LARGE || IS_SMALL(sp[k]) || (k==1 && sp[k]==INNER));   /* every page is accounted for */
       assert(onlist[k]==(sp[k]==SFREE));                             /* and none is lost to the free lists */
       assert(!(wpunched[k] && sp[k]!=SFREE));
       if
       :: sp[k]==SFREE -> assert(st[k]!=LIVE)
       :: sp[k]==LARGE -> assert(st[k]==LIVE && HELD(k))
       :: k==0 && IS_SMALL(sp[k]) -> assert(TWO); assert(!EMPTY); assert(sp[k]!=SMALL(COLL));
          assert(sp[k]==SMALL(NONE) || !GONE(sp[k]-16))
       :: else -> assert(sp[0]==LARGE || IS_SMALL(sp[0]))
       fi;
       if :: st[k]==LIVE -> assert(HELD(k)); assert(USABLE(k)) :: else fi;
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
  :: break
  od;
  atomic { ckill==0 -> k=0; ck=0; kdone=1 }
}

#define LIVE_WORD(b,n) st[b]=LIVE; cnt[b]=n
#define DATA(u) un[u]=COMMITTED; kern[u]=1
#define SMALL_SPAN(o) sp[0]=SMALL(o); sp[1]=INNER; wire=0
#define START(i) (INIT==(i) || INIT==9)
init {
  atomic {
    pin[0]=NIL; pin[1]=NIL; wire=NIL;
    if
    :: START(0) -> onlist[0]=1; onlist[1]=1; DATA(0); wpunched[1]=1                   /* all free: page 0 data, page 1 a hole */
    :: START(1) -> sp[0]=LARGE; DATA(0); LIVE_WORD(0,2); pin[0]=0; pin[1]=0; wire=0; onlist[1]=1; wpunched[1]=1  /* two pins */
    :: START(2) -> SMALL_SPAN(0); DATA(0); DATA(1); LIVE_WORD(0,1); pin[1]=0          /* worker 0's span, 1 holds a block of it */
    :: START(3) -> SMALL_SPAN(0); DATA(0); LIVE_WORD(0,1); pin[1]=0; st[1]=HOLE       /* the same, unit 1 a hole */
    :: START(4) -> SMALL_SPAN(0); DATA(0); DATA(1); LIVE_WORD(0,1); pin[1]=0; st[1]=HOLE  /* unit 1 only set aside */
    :: START(5) -> SMALL_SPAN(NONE); DATA(0); DATA(1); LIVE_WORD(0,1); pin[1]=0; st[1]=HOLE  /* an orphan of that kind */
    :: START(6) -> sp[0]=LARGE; sp[1]=INNER; DATA(0); DATA(1); LIVE_WORD(0,1); pin[0]=0; wire=0   /* a large block of two pages */
    :: START(7) -> SMALL_SPAN(0); DATA(0); DATA(1); LIVE_WORD(0,1); pin[0]=0          /* worker 0's span, it holds a block of it */
    fi
  };
  atomic { run worker(0); run worker(1); run coll(); run killer() }
}
