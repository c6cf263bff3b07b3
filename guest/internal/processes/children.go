package processes

import (
	"sync"
	"syscall"
	"time"
	"unsafe"
)

const (
	prSetChildSubreaper = 36
	pAll                = 0
)

// children are the daemon's own child processes. Forking, reaping and signalling exclude each other, so that a pid in
// the map is always the process it stands for.
type children struct {
	mutex   sync.Mutex
	arrived sync.Cond
	byPID   map[int]func(syscall.WaitStatus)
}

func newChildren() *children {
	children := &children{byPID: map[int]func(syscall.WaitStatus){}}
	children.arrived.L = &children.mutex
	_, _, _ = syscall.RawSyscall(syscall.SYS_PRCTL, prSetChildSubreaper, 1, 0)
	go children.reap()
	return children
}

func (c *children) has(pid int) bool {
	c.mutex.Lock()
	defer c.mutex.Unlock()
	return c.byPID[pid] != nil
}

// reap waits for every child, ours and orphans, in one place. It looks first without taking (WNOWAIT): once a zombie is
// taken its pid may be given to another process, so that happens under the mutex.
func (c *children) reap() {
	var information [128]byte // siginfo_t; the pid lies behind signo, errno, code and four bytes of padding
	for {
		_, _, errno := syscall.Syscall6(syscall.SYS_WAITID, pAll, 0, uintptr(unsafe.Pointer(&information)),
			syscall.WEXITED|syscall.WNOWAIT, 0, 0)
		if errno == syscall.EINTR {
			continue
		}
		c.mutex.Lock()
		if errno != 0 {
			// No children, hence no orphans that descend from us; one put into this namespace from outside waits as a
			// zombie for the next spawn. Under the mutex none of ours can arrive between the look and this wait.
			if len(c.byPID) == 0 {
				c.arrived.Wait()
				c.mutex.Unlock()
			} else {
				c.mutex.Unlock()
				time.Sleep(10 * time.Millisecond)
			}
			continue
		}
		pid := int(*(*int32)(unsafe.Pointer(&information[16])))
		var status syscall.WaitStatus
		if taken, err := syscall.Wait4(pid, &status, syscall.WNOHANG, nil); err == nil && taken == pid {
			if exited := c.byPID[pid]; exited != nil {
				delete(c.byPID, pid)
				exited(status)
			}
		}
		c.mutex.Unlock()
	}
}
