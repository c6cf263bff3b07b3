package processes

import (
	"bytes"
	"maps"
	"os"
	"slices"
	"strconv"
	"syscall"
	"time"

	"pandastack/guest/internal/faults"
	"pandastack/guest/internal/session"
)

const (
	freezeBudget   = 20 * time.Second // Less than the host waits. A busy host that emulates the processor took two, in another such machine over five.
	parentPatience = 50 * time.Millisecond
	pendingGrace   = 100 * time.Millisecond
	politeRounds   = 4 // From here on PID 1 stops everybody by one call: some spawn faster than we look.
)

// named is a process for good: a pid alone may come to mean another one.
type named struct {
	pid     int
	started uint64
}

// frozen is what a freeze has stopped, and what it must not continue later.
type frozen struct {
	since    time.Time
	thawed   chan struct{}       // closed by Continue
	ours     []named             // in the order in which they were stopped: parents before children
	sent     map[named]time.Time // the same, and when they were first told to stop
	theirs   map[named]bool      // stopped by somebody else before
	whole    map[named]bool      // no thread of it runs
	swept    bool                // kill(-1) was used: who is found stopped from here on was stopped by it
	timeouts map[*Process]time.Duration
	count    int // of ours, without those that were ending when they were told to stop
	buffer   []byte
}

// enter lets a process start, or waits while all are frozen. What waits for a call that is aborted meanwhile never starts:
// in a copy of this machine nobody asked for it.
func (r *Registry) enter(cancel <-chan struct{}) error {
	for {
		r.mutex.Lock()
		held := r.frozen
		if held == nil {
			r.starting++
			r.mutex.Unlock()
			return nil
		}
		r.mutex.Unlock()
		select {
		case <-cancel:
		case <-held.thawed:
		}
		select {
		case <-cancel:
			return session.ErrAborted
		default:
		}
	}
}

func (r *Registry) leave() {
	r.mutex.Lock()
	r.starting--
	r.mutex.Unlock()
}

// Freeze stops every process but the daemon, and the clocks of their time limits; it returns how many it stopped. New
// ones wait from here on. All or nothing: `not_frozen` means that everybody runs as before. Calls of Freeze and Continue
// must not overlap.
//
// Parents are stopped before children, and continued after them. So a shell with job control never finds a child of its
// own stopped, because waitpid only tells of children that still are.
func (r *Registry) Freeze() (int, error) {
	r.mutex.Lock()
	if r.frozen != nil {
		defer r.mutex.Unlock()
		return r.frozen.count, nil
	}
	all := &frozen{since: time.Now(), thawed: make(chan struct{}), sent: map[named]time.Time{}, theirs: map[named]bool{},
		whole: map[named]bool{}, timeouts: map[*Process]time.Duration{}, buffer: make([]byte, statBytes)}
	r.frozen = all
	known := slices.Clone(r.order)
	r.mutex.Unlock()
	deadline := all.since.Add(freezeBudget)
	err := r.awaitStarts(deadline)
	for _, process := range known {
		if left, running := process.pauseTimeout(); running {
			all.timeouts[process] = left
		}
	}
	if err == nil {
		err = all.stopAll(r.children, deadline)
	}
	if err != nil {
		r.Continue()
		return 0, err
	}
	return all.count, nil
}

// awaitStarts waits for programs that are being started: they are in no list yet, and would run on.
func (r *Registry) awaitStarts(deadline time.Time) error {
	for {
		r.mutex.Lock()
		starting := r.starting
		r.mutex.Unlock()
		if starting == 0 {
			return nil
		}
		if time.Now().After(deadline) {
			return faults.New("not_frozen", "%d processes are still being started", starting)
		}
		time.Sleep(200 * time.Microsecond)
	}
}

// Continue lets go what Freeze stopped and returns how many that were; 0 if nothing is frozen.
func (r *Registry) Continue() int {
	r.mutex.Lock()
	all := r.frozen
	r.mutex.Unlock()
	if all == nil {
		return 0
	}
	count := 0
	r.children.mutex.Lock()
	for _, one := range slices.Backward(all.ours) {
		entry, found := look(one.pid)
		if found && entry.started == one.started && !entry.over() && syscall.Kill(one.pid, syscall.SIGCONT) == nil {
			count++
		}
	}
	r.children.mutex.Unlock()
	for process, left := range all.timeouts {
		process.resumeTimeout(left)
	}
	r.mutex.Lock()
	r.frozen = nil
	r.mutex.Unlock()
	close(all.thawed)
	return count
}

// stopAll looks and stops until a look finds nobody who could still run code of a user.
func (f *frozen) stopAll(children *children, deadline time.Time) error {
	for round, pause := 0, 100*time.Microsecond; ; round++ {
		moving, err := f.round(children, round >= politeRounds && os.Getpid() == 1)
		if err != nil {
			return faults.New("not_frozen", "/proc: %v", err)
		}
		if len(moving) == 0 {
			return nil
		}
		if time.Now().After(deadline) {
			return faults.New("not_frozen", "%d processes go on, such as %d", len(moving), moving[0])
		}
		if round > 0 { // Whoever was told a moment ago is most likely stopped by now.
			time.Sleep(pause)
			pause = min(2*pause, 10*time.Millisecond)
		}
	}
}

// round looks at everybody once, tells those who run to stop, level by level, and returns them. Nothing of ours is reaped
// meanwhile, so that pids keep their meaning.
func (f *frozen) round(children *children, sweep bool) ([]int, error) {
	children.mutex.Lock()
	defer children.mutex.Unlock()
	if sweep {
		_ = syscall.Kill(-1, syscall.SIGSTOP) // No fork can be missed by it.
	}
	entries, err := scanAll()
	if err != nil {
		return nil, err
	}
	levels, err := levelsOf(entries, os.Getpid())
	if err != nil {
		return nil, err
	}
	parents := map[int]bool{}
	for _, entry := range entries {
		parents[entry.parent] = true
	}
	f.count = 0
	var moving []int
	for _, depth := range slices.Sorted(maps.Keys(levels)) {
		var awaited []int
		for _, entry := range levels[depth] {
			if f.still(entry, sweep) {
				if _, ours := f.sent[named{entry.pid, entry.started}]; ours {
					f.count++
				}
				continue
			}
			moving = append(moving, entry.pid)
			if f.stop(entry); parents[entry.pid] {
				awaited = append(awaited, entry.pid)
			}
		}
		f.awaitStopped(awaited)
	}
	f.swept = f.swept || sweep
	return moving, nil
}

// stop tells a process to stop. It is repeated in each round: who still ran may have continued it.
func (f *frozen) stop(entry processEntry) {
	one := named{entry.pid, entry.started}
	if _, known := f.sent[one]; !known {
		f.sent[one] = time.Now()
		f.ours = append(f.ours, one)
	}
	_ = syscall.Kill(entry.pid, syscall.SIGSTOP)
}

// still says that a process cannot run a user's code until it is continued: it is stopped, over, or the first thing it
// does when its call into the kernel ends is to stop.
func (f *frozen) still(entry processEntry, sweep bool) bool {
	one := named{entry.pid, entry.started}
	since, known := f.sent[one]
	switch f.state(entry, one) {
	case 'Z', 'X', 'x':
		return true
	case 'T', 't':
		if !known && !f.theirs[one] {
			if !f.swept && !sweep {
				f.theirs[one] = true
			} else {
				f.stop(entry)
			}
		}
		return true
	case 'D': // Such as the parent of a vfork.
		if known {
			f.stop(entry)
		}
		return known
	case 'S':
		return known && time.Since(since) > pendingGrace && stopPending(entry.pid)
	}
	return false
}

// state is that of all threads together: /proc tells of the first one, which may be stopped, or over, while others run on.
func (f *frozen) state(entry processEntry, one named) byte {
	if entry.threads <= 1 || entry.state == 'R' || entry.state == 'S' || entry.state == 'T' && f.whole[one] {
		return entry.state
	}
	state := entry.state
	if state == 'Z' {
		state = 'T'
	}
	path := "/proc/" + strconv.Itoa(entry.pid) + "/task"
	threads, _ := numbersIn(path)
	for _, thread := range threads {
		if thread == entry.pid {
			continue
		}
		found, err := readStat(path+"/"+strconv.Itoa(thread)+"/stat", thread, f.buffer)
		if err != nil {
			continue
		}
		switch found.state {
		case 'T', 't', 'Z', 'X', 'x':
		case 'D':
			state = 'D'
		default:
			return found.state
		}
	}
	f.whole[one] = state == 'T'
	return state
}

func (e processEntry) over() bool {
	return e.zombie || e.state == 'X' || e.state == 'x'
}

// awaitStopped waits for parents, for a moment: one in the middle of waitpid must stop before its child does.
func (f *frozen) awaitStopped(pids []int) {
	deadline := time.Now().Add(parentPatience)
	for _, pid := range pids {
		for pause := 20 * time.Microsecond; ; pause = min(2*pause, 2*time.Millisecond) {
			entry, err := readStat("/proc/"+strconv.Itoa(pid)+"/stat", pid, f.buffer)
			if err != nil || entry.state != 'R' && entry.state != 'S' || time.Now().After(deadline) {
				break
			}
			time.Sleep(pause)
		}
	}
}

// levelsOf sorts the processes that are to be stopped by their distance from the root of the tree. Of PID 1 that is all of
// its namespace, those put in from outside included; else it is whoever descends from the daemon, because orphans come to it.
func levelsOf(entries []processEntry, self int) (map[int][]processEntry, error) {
	parents := make(map[int]int, len(entries))
	for _, entry := range entries {
		parents[entry.pid] = entry.parent
	}
	if _, found := parents[self]; !found {
		return nil, syscall.ENOENT // It is not the /proc of our processes; then nobody knows who runs.
	}
	levels := map[int][]processEntry{}
	for _, entry := range entries {
		if entry.pid == self || entry.kernel || entry.over() {
			continue
		}
		depth, above := 1, entry.parent
		for ; above != self && depth <= len(entries); depth++ {
			next, found := parents[above]
			if !found {
				break
			}
			above = next
		}
		if above == self || self == 1 {
			levels[depth] = append(levels[depth], entry)
		}
	}
	return levels, nil
}

// stopPending says whether SIGSTOP waits for a process.
func stopPending(pid int) bool {
	text, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/status")
	if err != nil {
		return false
	}
	for line := range bytes.Lines(text) {
		if mask, found := bytes.CutPrefix(line, []byte("ShdPnd:")); found {
			pending, _ := strconv.ParseUint(string(bytes.TrimSpace(mask)), 16, 64)
			return pending&(1<<(syscall.SIGSTOP-1)) != 0
		}
	}
	return false
}
