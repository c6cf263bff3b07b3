package processes

import (
	"os"
	"runtime"
	"strings"
	"syscall"
	"unsafe"

	"pandastack/guest/internal/faults"
)

const (
	prCapbsetRead     = 23
	prCapbsetDrop     = 24
	prCapAmbient      = 47
	prCapAmbientClear = 4
)

// userCapabilities are Docker's default without NET_RAW: chown, dac_override, fowner, fsetid, kill, setgid, setuid,
// setpcap, net_bind_service, sys_chroot, mknod, audit_write, setfcap.
var userCapabilities = []uintptr{0, 1, 3, 4, 5, 6, 7, 8, 10, 18, 27, 29, 31}

type spawnRequest struct {
	program string
	argv    []string
	attr    *syscall.ProcAttr
	started func(pid int) // called before the child can be reaped
	result  chan error
}

// spawner forks on one thread that has given up what user processes must not have. Capabilities are per thread and a
// child gets those of the thread that forks, so no wrapper program is needed between fork and exec.
type spawner struct {
	requests chan spawnRequest
	children *children
	cgroup   int // in which children begin; 0 for the daemon's own
}

func newSpawner(children *children) *spawner {
	spawner := &spawner{requests: make(chan spawnRequest), children: children}
	go spawner.serve()
	return spawner
}

func (s *spawner) serve() {
	runtime.LockOSThread() // Never unlocked: a thread with fewer rights must not run other goroutines.
	boundCapabilities()
	for request := range s.requests {
		s.children.mutex.Lock()
		pid, err := syscall.ForkExec(request.program, request.argv, request.attr)
		if err == nil {
			request.started(pid)
			s.children.arrived.Broadcast()
		}
		s.children.mutex.Unlock()
		request.result <- err
	}
}

func (s *spawner) spawn(request spawnRequest) error {
	request.result = make(chan error, 1)
	if s.cgroup != 0 {
		request.attr.Sys.UseCgroupFD, request.attr.Sys.CgroupFD = true, s.cgroup
	}
	s.requests <- request
	return <-request.result
}

// boundCapabilities cannot fail in a way that matters: without CAP_SETPCAP the daemon has nothing to give away.
func boundCapabilities() {
	allowed := map[uintptr]bool{}
	for _, capability := range userCapabilities {
		allowed[capability] = true
	}
	for capability := uintptr(0); capability < 64; capability++ {
		if has, _, err := syscall.RawSyscall(syscall.SYS_PRCTL, prCapbsetRead, capability, 0); err != 0 || has == 0 {
			continue
		}
		if !allowed[capability] {
			_, _, _ = syscall.RawSyscall(syscall.SYS_PRCTL, prCapbsetDrop, capability, 0)
		}
	}
	_, _, _ = syscall.RawSyscall6(syscall.SYS_PRCTL, prCapAmbient, prCapAmbientClear, 0, 0, 0, 0)
	header := struct {
		version uint32
		pid     int32
	}{version: 0x20080522}
	var sets [2]struct{ effective, permitted, inheritable uint32 }
	_, _, err := syscall.RawSyscall(syscall.SYS_CAPGET, uintptr(unsafe.Pointer(&header)), uintptr(unsafe.Pointer(&sets)), 0)
	if err == 0 {
		sets[0].inheritable, sets[1].inheritable = 0, 0
		_, _, _ = syscall.RawSyscall(syscall.SYS_CAPSET, uintptr(unsafe.Pointer(&header)), uintptr(unsafe.Pointer(&sets)), 0)
	}
}

// findProgram looks argv[0] up as a shell does. A name with a slash is left to exec, which sees it from cwd.
func findProgram(name, path, cwd string) (string, error) {
	if name == "" {
		return "", faults.Invalid("an empty program name")
	}
	if strings.Contains(name, "/") {
		return name, nil
	}
	missing := &faults.Fault{Code: "not_executable", Message: name + ": command not found", Errno: int(syscall.ENOENT)}
	for directory := range strings.SplitSeq(path, ":") {
		switch {
		case directory == "":
			directory = cwd
		case !strings.HasPrefix(directory, "/"):
			directory = cwd + "/" + directory
		}
		candidate := directory + "/" + name
		var stat syscall.Stat_t
		if syscall.Stat(candidate, &stat) != nil || stat.Mode&syscall.S_IFMT != syscall.S_IFREG {
			continue
		}
		if stat.Mode&0o111 != 0 {
			return candidate, nil
		}
		missing = &faults.Fault{Code: "not_executable", Message: name + ": permission denied", Errno: int(syscall.EACCES)}
	}
	return "", missing
}

// spawnFault finds out which of the child's steps failed; exec and chdir report the same numbers.
func spawnFault(program, cwd string, err error) error {
	errno, _ := err.(syscall.Errno)
	if info, statErr := os.Stat(cwd); statErr != nil || !info.IsDir() {
		return &faults.Fault{Code: "bad_cwd", Message: cwd + ": not a directory that can be entered", Errno: int(errno)}
	}
	switch errno {
	case syscall.ENOENT, syscall.EACCES, syscall.ENOEXEC, syscall.ENOTDIR, syscall.EISDIR, syscall.ELOOP:
		return &faults.Fault{Code: "not_executable", Message: program + ": " + errno.Error(), Errno: int(errno)}
	}
	return &faults.Fault{Code: "spawn_failed", Message: program + ": " + err.Error(), Errno: int(errno)}
}
