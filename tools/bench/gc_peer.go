// The graph of tests/c/bench_gc.c for Go's own collector, as tools/bench.py gc builds and runs it.
//
//	go build -o gc_peer gc_peer.go
//	GOMAXPROCS=1 GOGC=off ./gc_peer graph|tree BLOCKS CYCLES
//
// Blocks are as large as the core's, and lie in the order in which they were made there. Prints a
// line for each collection: ns of CPU time of the process, ns on the clock.
package main

import (
	"fmt"
	"os"
	"runtime"
	"strconv"
	"syscall"
	"time"
	"unsafe"
)

// A node's first two words are no references, as in the core.
type node2 struct {
	head [2]uint64
	ref  [2]unsafe.Pointer
}
type node3 struct {
	head [2]uint64
	ref  [3]unsafe.Pointer
}
type node4 struct {
	head [2]uint64
	ref  [4]unsafe.Pointer
}
type leaf [48]byte

func nextRandom(state *uint64) uint64 {
	*state ^= *state >> 12
	*state ^= *state << 25
	*state ^= *state >> 27
	return *state * 0x2545f4914f6cdd1d
}

func randomBelow(state *uint64, n uint32) uint32 {
	return uint32((nextRandom(state) >> 32) * uint64(n) >> 32)
}

func degree(tree bool, i, n uint32) uint32 {
	if tree {
		if 2*uint64(i)+1 < uint64(n) {
			return 2
		}
		return 0
	}
	if i < 64 || i%5 < 2 {
		return 2 + i%3
	}
	return 0
}

func order(tree bool, n uint32, state *uint64) []uint32 {
	place := make([]uint32, n)
	for k := range place {
		place[k] = uint32(k)
	}
	for k := n; !tree && k > 1; k-- {
		other := randomBelow(state, k)
		place[k-1], place[other] = place[other], place[k-1]
	}
	return place
}

func make1(d uint32) (unsafe.Pointer, []unsafe.Pointer) {
	switch d {
	case 2:
		n := new(node2)
		return unsafe.Pointer(n), n.ref[:]
	case 3:
		n := new(node3)
		return unsafe.Pointer(n), n.ref[:]
	case 4:
		n := new(node4)
		return unsafe.Pointer(n), n.ref[:]
	}
	return unsafe.Pointer(new(leaf)), nil
}

func build(tree bool, n uint32) unsafe.Pointer {
	state := uint64(1)
	at, refs := make([]unsafe.Pointer, n), make([][]unsafe.Pointer, n)
	for _, i := range order(tree, n, &state) {
		at[i], refs[i] = make1(degree(tree, i, n))
	}
	next := uint32(1)
	for i := range refs {
		for k := range refs[i] {
			switch {
			case k < 3 && next < n:
				refs[i][k] = at[next]
				next++
			case !tree:
				refs[i][k] = at[randomBelow(&state, n)]
			}
		}
	}
	return at[0]
}

func cpuNs() int64 {
	var use syscall.Rusage
	syscall.Getrusage(syscall.RUSAGE_SELF, &use)
	return use.Utime.Nano() + use.Stime.Nano()
}

func main() {
	n, _ := strconv.ParseUint(os.Args[2], 10, 32)
	cycles, _ := strconv.Atoi(os.Args[3])
	first := build(os.Args[1] == "tree", uint32(n))
	runtime.GC()
	for range cycles {
		cpu, clock := cpuNs(), time.Now()
		runtime.GC()
		fmt.Println(cpuNs()-cpu, time.Since(clock).Nanoseconds())
	}
	runtime.KeepAlive(first)
}
