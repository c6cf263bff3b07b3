package processes

import (
	"errors"
	"fmt"
	"os"
	"testing"
	"time"

	"pandastack/guest/internal/session"
)

func TestParseStat(t *testing.T) {
	line := "7 (a) R (b)) T 3 7 2 0 -1 2097216 1 2 3 4 5 6 7 8 20 0 4 0 4711 1 1"
	entry, ok := parseStat([]byte(line))
	if !ok || entry.state != 'T' || entry.parent != 3 || entry.group != 7 || entry.session != 2 || !entry.kernel ||
		entry.threads != 4 || entry.started != 4711 || entry.zombie {
		t.Fatalf("%+v %v", entry, ok)
	}
	for _, line := range []string{"", "7 (x) R 1 2", "no name"} {
		if _, ok := parseStat([]byte(line)); ok {
			t.Fatal(line)
		}
	}
}

func TestLevelsOf(t *testing.T) {
	process := func(pid, parent int) processEntry {
		return processEntry{pid: pid, parent: parent, state: 'S', threads: 1}
	}
	kernel, dead := process(2, 0), process(9, 5)
	kernel.kernel, dead.zombie, dead.state = true, true, 'Z'
	headless := process(10, 5)
	headless.state, headless.threads = 'Z', 3
	// 20 and 21 are each other's parent: /proc is not read at one moment. 30 was put in from outside.
	entries := []processEntry{process(1, 0), kernel, process(5, 1), process(6, 5), dead, headless, process(20, 21),
		process(21, 20), process(30, 0)}
	for self, wanted := range map[int]string{1: "map[5:1 6:2 10:2 20:10 21:10 30:1]", 5: "map[6:1 10:1]", 6: "map[]"} {
		levels, err := levelsOf(entries, self)
		found := map[int]int{}
		for depth, level := range levels {
			for _, entry := range level {
				found[entry.pid] = depth
			}
		}
		if err != nil || fmt.Sprint(found) != wanted {
			t.Fatal(self, found, err)
		}
	}
	if _, err := levelsOf(entries, 77); err == nil {
		t.Fatal("a /proc without us tells nothing")
	}
}

func TestAProgramWaitsWhileFrozenAndNotForAnAbortedCall(t *testing.T) {
	registry := &Registry{frozen: &frozen{thawed: make(chan struct{})}}
	aborted, waiting := make(chan struct{}), make(chan error, 1)
	go func() { waiting <- registry.enter(aborted) }()
	select {
	case err := <-waiting:
		t.Fatal("did not wait", err)
	case <-time.After(20 * time.Millisecond):
	}
	// Both at once, as in a copy: its HELLO first, then its identity.
	close(aborted)
	held := registry.frozen
	registry.mutex.Lock()
	registry.frozen = nil
	registry.mutex.Unlock()
	close(held.thawed)
	if err := <-waiting; !errors.Is(err, session.ErrAborted) || registry.starting != 0 {
		t.Fatal(err, registry.starting)
	}
	if err := registry.enter(make(chan struct{})); err != nil || registry.starting != 1 {
		t.Fatal(err)
	}
}

func TestAStopThatIsPendingIsSeen(t *testing.T) {
	if stopPending(os.Getpid()) {
		t.Fatal("nobody stops us")
	}
}

func TestATimeLimitStandsStill(t *testing.T) {
	process := newProcess(MinOutput)
	if _, running := process.pauseTimeout(); running {
		t.Fatal("there is none")
	}
	process.arm(time.Hour)
	left, running := process.pauseTimeout()
	if !running || left > time.Hour || left < time.Hour-time.Minute {
		t.Fatal(left, running)
	}
	if _, again := process.pauseTimeout(); again {
		t.Fatal("it stands still already")
	}
	process.resumeTimeout(left)
	if until := time.Until(process.ends); until > left || until < left-time.Minute {
		t.Fatal(until)
	}
	process.timeout.Stop()
}
