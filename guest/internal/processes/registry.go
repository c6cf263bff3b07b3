// Package processes starts, watches and ends the programs users run. A process belongs to no session: its output waits
// in rings, and whoever attaches reads from there.
package processes

import (
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"os"
	"regexp"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"pandastack/guest/internal/faults"
)

const (
	maxProcesses   = 4096
	maxIDLength    = 64
	keptFinished   = 64
	keptMemory     = 16 << 20
	keptFiles      = 256 << 20
	reportActivity = 20 * time.Millisecond
	pruneAfter     = 100 * time.Millisecond
)

var validID = regexp.MustCompile(`^[a-z0-9-]{1,64}$`)

// Registry is all processes the daemon knows of: the running ones and the last finished.
type Registry struct {
	// Activity is told the number of live processes after it went from 0 to more or back. Set before the first start.
	Activity func(live int)

	children *children
	spawner  *spawner

	mutex    sync.Mutex
	byID     map[string]*Process
	order    []*Process // as started
	live     int        // running, not baked
	baked    int
	reported bool // what Activity heard last: live > 0
	pending  bool
	machine  map[string]string
	warm     *interpreter
	pruning  atomic.Bool
	starting int      // programs between admission and the list of processes
	frozen   *frozen  // nil while processes run
	hook     *Process // while one runs
}

func NewRegistry() *Registry {
	children := newChildren()
	return &Registry{children: children, spawner: newSpawner(children), byID: map[string]*Process{},
		Activity: func(int) {}}
}

// Confine lets what is started from now on begin in this cgroup.
func (r *Registry) Confine(cgroup string) error {
	descriptor, err := syscall.Open(cgroup, syscall.O_RDONLY|syscall.O_DIRECTORY|syscall.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("%s: %w", cgroup, err)
	}
	r.spawner.cgroup = descriptor
	return nil
}

// Counts returns the running processes: users', and baked ones.
func (r *Registry) Counts() (live, baked int) {
	r.mutex.Lock()
	defer r.mutex.Unlock()
	return r.live, r.baked
}

// Strays counts running processes that no command of the host stands for any more, such as a daemon that one left
// behind. It reads all of /proc, so it is for moments when nothing else runs.
func (r *Registry) Strays() int {
	self := os.Getpid()
	baked := map[int]bool{}
	r.mutex.Lock()
	for _, process := range r.order {
		if process.Baked {
			baked[process.pid] = true
		}
	}
	if r.hook != nil && r.hook.running() {
		baked[r.hook.pid] = true
	}
	r.mutex.Unlock()
	entries := scan()
	parents := make(map[int]int, len(entries))
	for _, entry := range entries {
		parents[entry.pid] = entry.parent
	}
	count := 0
	for _, entry := range entries {
		if entry.zombie || entry.pid == self {
			continue
		}
		// Ours are all below us, because orphans come to us; those below a baked process belong to it.
		for pid, depth := entry.pid, 0; pid > 0 && depth < len(entries) && !baked[pid]; depth++ {
			if pid = parents[pid]; pid == self {
				count++
				break
			}
		}
	}
	return count
}

// SetEnvironment replaces what identity gives to all later processes.
func (r *Registry) SetEnvironment(environment map[string]string) {
	r.mutex.Lock()
	defer r.mutex.Unlock()
	r.machine = environment
}

func (r *Registry) find(id string) (*Process, error) {
	r.mutex.Lock()
	defer r.mutex.Unlock()
	process := r.byID[id]
	if process == nil || !process.visible {
		return nil, faults.New("no_process", "no process %.64q", id)
	}
	return process, nil
}

func (r *Registry) all() []*Process {
	r.mutex.Lock()
	defer r.mutex.Unlock()
	return slices.DeleteFunc(slices.Clone(r.order), func(process *Process) bool { return !process.visible })
}

// publish makes a process that has started findable; before, it has no pid that could be signalled.
func (r *Registry) publish(process *Process) {
	r.mutex.Lock()
	process.visible = true
	r.mutex.Unlock()
}

// claim reserves a process's id and its place in the list, before it runs.
func (r *Registry) claim(process *Process, id string) error {
	if id == "" {
		var random [8]byte
		_, _ = rand.Read(random[:])
		id = hex.EncodeToString(random[:])
	} else if !validID.MatchString(id) {
		return faults.Invalid("id %.80q", id)
	}
	r.mutex.Lock()
	defer r.mutex.Unlock()
	if r.byID[id] != nil {
		return faults.New("process_exists", "process %s exists", id)
	}
	if r.live+r.baked >= maxProcesses {
		return faults.New("too_many", "%d processes run", maxProcesses)
	}
	process.ID = id
	r.byID[id] = process
	r.order = append(r.order, process)
	r.count(process, 1)
	return nil
}

// abandon takes back a claim whose program did not start.
func (r *Registry) abandon(process *Process) {
	r.mutex.Lock()
	defer r.mutex.Unlock()
	delete(r.byID, process.ID)
	r.order = slices.DeleteFunc(r.order, func(other *Process) bool { return other == process })
	r.count(process, -1)
}

// count keeps the numbers of running processes; the mutex is held. Activity hears of changes that last: a command of a
// few milliseconds would cost more in events than in work.
func (r *Registry) count(process *Process, change int) {
	if process.hook {
		return
	}
	if process.Baked {
		r.baked += change
		return
	}
	r.live += change
	if (r.live > 0) != r.reported && !r.pending {
		r.pending = true
		time.AfterFunc(reportActivity, r.report)
	}
}

func (r *Registry) report() {
	r.mutex.Lock()
	r.pending = false
	live := r.live
	changed := (live > 0) != r.reported
	r.reported = live > 0
	r.mutex.Unlock()
	if changed {
		r.Activity(live)
	}
}

// finished is called by the reaper, with the children's mutex held.
func (r *Registry) finished(process *Process, status syscall.WaitStatus) {
	// Counted before anybody can see the exit, so that a host that asks after it gets the new number.
	r.mutex.Lock()
	r.count(process, -1)
	r.mutex.Unlock()
	process.exited(status)
	r.pruneSoon()
}

// pruneSoon has one prune under way at most, however many processes end.
func (r *Registry) pruneSoon() {
	if !r.pruning.CompareAndSwap(false, true) {
		return
	}
	// Most of what has just exited is not settled yet, or still being read by its host.
	time.AfterFunc(pruneAfter, r.prune)
}

// prune forgets the oldest finished processes beyond what is kept.
func (r *Registry) prune() {
	r.pruning.Store(false)
	r.mutex.Lock()
	defer r.mutex.Unlock()
	var count int
	var memory, files int64
	for index := len(r.order) - 1; index >= 0; index-- {
		process := r.order[index]
		process.mutex.Lock()
		if process.settled() {
			count++
			for side := range process.outputs {
				memory += int64(len(process.outputs[side].memory))
				files += process.outputs[side].fileBytes()
			}
			attached := len(process.outputs[0].readers)+len(process.outputs[1].readers) > 0
			if (count > keptFinished || memory > keptMemory || files > keptFiles) && count > 1 && !attached {
				process.forget()
				delete(r.byID, process.ID)
				r.order = slices.Delete(r.order, index, index+1)
			}
		}
		process.mutex.Unlock()
	}
}

// forget frees what a process holds; its mutex is held.
func (p *Process) forget() {
	p.drop = true
	for index := range p.outputs {
		p.outputs[index].discardFile()
		p.outputs[index].memory = nil
		p.outputs[index].start = p.outputs[index].total
	}
	p.changed.Broadcast()
}
