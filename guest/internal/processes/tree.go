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
	statFields  = 4 // state, ppid, pgrp, session: what follows the name
	environSize = 256 << 10
)

type processEntry struct {
	pid, parent, group, session int
	zombie                      bool
}

// scan reads all of /proc once.
func scan() []processEntry {
	directory, err := os.Open("/proc")
	if err != nil {
		return nil
	}
	defer directory.Close()
	names, _ := directory.Readdirnames(-1)
	entries := make([]processEntry, 0, len(names))
	for _, name := range names {
		pid, err := strconv.Atoi(name)
		if err != nil {
			continue
		}
		text, err := os.ReadFile("/proc/" + name + "/stat")
		if err != nil {
			continue
		}
		// The name is in parentheses and may contain some itself, so look for the last one.
		fields := bytes.Fields(text[bytes.LastIndexByte(text, ')')+1:])
		if len(fields) < statFields {
			continue
		}
		entry := processEntry{pid: pid, zombie: fields[0][0] == 'Z'}
		entry.parent, _ = strconv.Atoi(string(fields[1]))
		entry.group, _ = strconv.Atoi(string(fields[2]))
		entry.session, _ = strconv.Atoi(string(fields[3]))
		entries = append(entries, entry)
	}
	return entries
}

// runs says whether a process exists and has not ended.
func runs(pid int) bool {
	text, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return false
	}
	fields := bytes.Fields(text[bytes.LastIndexByte(text, ')')+1:])
	return len(fields) > 0 && fields[0][0] != 'Z'
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
