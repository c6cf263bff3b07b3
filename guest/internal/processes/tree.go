package processes

import (
	"bytes"
	"os"
	"strconv"
	"syscall"
	"time"
)

const (
	marker      = "PANDASTACK_PROCESS_ID"
	killBudget  = 5 * time.Second
	environSize = 256 << 10
	statBytes   = 1024 // Of one line: a short name and 51 numbers.

	// Fields of /proc/PID/stat, counted from what follows the name.
	statParent, statGroup, statSession, statFlags, statThreads, statStarted = 1, 2, 3, 6, 17, 19

	kernelThread = 0x00200000 // PF_KTHREAD; gVisor has none and prints no flags.
)

type processEntry struct {
	pid, parent, group, session int
	threads                     int
	state                       byte
	kernel                      bool
	started                     uint64 // ticks after the boot: with the pid it names a process for good
	zombie                      bool   // over, and not reaped yet
}

// scan reads all of /proc once, and leaves out what cannot be read.
func scan() []processEntry {
	entries, _ := scanAll()
	return entries
}

// scanAll reads all of /proc once. The error is the first that is not the end of the process looked at.
func scanAll() ([]processEntry, error) {
	numbers, trouble := numbersIn("/proc")
	entries := make([]processEntry, 0, len(numbers))
	buffer := make([]byte, statBytes)
	for _, pid := range numbers {
		entry, err := readStat("/proc/"+strconv.Itoa(pid)+"/stat", pid, buffer)
		if err == nil {
			entries = append(entries, entry)
		} else if err != syscall.ENOENT && err != syscall.ESRCH && trouble == nil {
			trouble = err
		}
	}
	return entries, trouble
}

// numbersIn returns the names of a directory of /proc that are pids.
func numbersIn(path string) ([]int, error) {
	directory, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer directory.Close()
	names, err := directory.Readdirnames(-1)
	numbers := make([]int, 0, len(names))
	for _, name := range names {
		if number, err := strconv.Atoi(name); err == nil {
			numbers = append(numbers, number)
		}
	}
	return numbers, err
}

// readStat reads a `stat` of /proc, of a process or a thread, by three system calls: under gVisor each one is dear.
func readStat(path string, pid int, buffer []byte) (processEntry, error) {
	descriptor, err := syscall.Open(path, syscall.O_RDONLY|syscall.O_CLOEXEC, 0)
	if err != nil {
		return processEntry{}, err
	}
	count, err := ignoringInterrupts(func() (int, error) { return syscall.Read(descriptor, buffer) })
	_ = syscall.Close(descriptor)
	if err != nil {
		return processEntry{}, err
	}
	if count == 0 {
		return processEntry{}, syscall.ESRCH
	}
	entry, ok := parseStat(buffer[:count])
	if !ok {
		return processEntry{}, syscall.EIO
	}
	entry.pid = pid
	return entry, nil
}

func parseStat(text []byte) (processEntry, bool) {
	// The name is in parentheses and may contain some itself, so look for the last one.
	fields := bytes.Fields(text[bytes.LastIndexByte(text, ')')+1:])
	if len(fields) <= statStarted {
		return processEntry{}, false
	}
	entry := processEntry{state: fields[0][0]}
	entry.parent, _ = strconv.Atoi(string(fields[statParent]))
	entry.group, _ = strconv.Atoi(string(fields[statGroup]))
	entry.session, _ = strconv.Atoi(string(fields[statSession]))
	entry.threads, _ = strconv.Atoi(string(fields[statThreads]))
	entry.zombie = entry.state == 'Z' && entry.threads <= 1 // Its first thread may end before the others.
	flags, _ := strconv.ParseUint(string(fields[statFlags]), 10, 64)
	entry.kernel = flags&kernelThread != 0
	entry.started, _ = strconv.ParseUint(string(fields[statStarted]), 10, 64)
	return entry, true
}

// look reads one process; false if it is gone.
func look(pid int) (processEntry, bool) {
	entry, err := readStat("/proc/"+strconv.Itoa(pid)+"/stat", pid, make([]byte, statBytes))
	return entry, err == nil
}

// runs says whether a process exists and has not ended.
func runs(pid int) bool {
	entry, found := look(pid)
	return found && !entry.zombie
}

// members returns the living processes of a tree. `reaped` says that the leader's pid is no longer its own: while its
// session has members the kernel does not give the number away, so if somebody has that pid, the session is another's.
func members(id string, leader int, reaped bool, entries []processEntry) []int {
	wanted := []byte(marker + "=" + id)
	inside := map[int]bool{}
	bySession := true
	for _, entry := range entries {
		if reaped && entry.pid == leader {
			bySession = false
		}
	}
	for _, entry := range entries {
		led := bySession && (entry.pid == leader || entry.session == leader || entry.group == leader)
		inside[entry.pid] = led || marked(entry.pid, wanted)
	}
	for changed := true; changed; {
		changed = false
		for _, entry := range entries {
			if !inside[entry.pid] && inside[entry.parent] {
				inside[entry.pid], changed = true, true
			}
		}
	}
	self := os.Getpid()
	var found []int
	for _, entry := range entries {
		if inside[entry.pid] && !entry.zombie && entry.pid != self && entry.pid > 1 {
			found = append(found, entry.pid)
		}
	}
	return found
}

func marked(pid int, wanted []byte) bool {
	file, err := os.Open("/proc/" + strconv.Itoa(pid) + "/environ")
	if err != nil {
		return false
	}
	defer file.Close()
	environ := make([]byte, 4096)
	filled := 0
	for {
		count, err := file.Read(environ[filled:])
		filled += count
		if err != nil || count == 0 || filled >= environSize {
			break
		}
		if filled == len(environ) {
			environ = append(environ, make([]byte, len(environ))...)
		}
	}
	for entry := range bytes.SplitSeq(environ[:filled], []byte{0}) {
		if bytes.Equal(entry, wanted) {
			return true
		}
	}
	return false
}

// Signal sends a signal to the main process, or to all of its tree, and returns how many got it. SIGKILL for a tree is
// repeated until nobody is left: a process may fork between the look and the kill.
func (p *Process) Signal(number syscall.Signal, tree bool) (int, error) {
	if number == syscall.SIGKILL {
		p.blame("killed")
	}
	if !tree {
		return p.signalLeader(number)
	}
	sent := map[int]bool{}
	deadline := time.Now().Add(killBudget)
	for pause := time.Millisecond; ; pause = min(2*pause, 50*time.Millisecond) {
		found := p.signalMembers(number)
		for _, pid := range found {
			sent[pid] = true
		}
		if len(found) == 0 || number != syscall.SIGKILL || time.Now().After(deadline) {
			return len(sent), nil
		}
		time.Sleep(pause)
	}
}

// signalMembers looks and signals while nothing of ours is reaped, so that the leader's number keeps its meaning.
func (p *Process) signalMembers(number syscall.Signal) []int {
	p.children.mutex.Lock()
	defer p.children.mutex.Unlock()
	if p.pid <= 0 {
		return nil // It never started, and 0 would mean much more than one tree.
	}
	found := members(p.ID, p.pid, !p.running(), scan())
	for _, pid := range found {
		_ = syscall.Kill(pid, number)
	}
	return found
}

func (p *Process) signalLeader(number syscall.Signal) (int, error) {
	p.children.mutex.Lock()
	defer p.children.mutex.Unlock()
	if p.pid <= 0 || !p.running() {
		return 0, nil
	}
	if err := syscall.Kill(p.pid, number); err != nil {
		return 0, err
	}
	return 1, nil
}

// blame notes why the process will have died by SIGKILL; the first reason stays.
func (p *Process) blame(reason string) {
	p.mutex.Lock()
	if p.killer == "" && p.exit == nil {
		p.killer = reason
	}
	p.mutex.Unlock()
}
