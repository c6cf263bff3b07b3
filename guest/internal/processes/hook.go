package processes

import (
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"os"
	"syscall"
	"time"

	"pandastack/guest/internal/faults"
	"pandastack/guest/internal/session"
)

// hookTail is how much of its output a failed hook may tell; a host shows an error in 500 characters.
const hookTail = 300

// Hook runs a program of the sandbox's owner as root and waits for its end. `hook_failed` if it does not exit with 0 before the
// limit, at which its tree is killed; likewise when `cancel` closes, which is ErrAborted.
func (r *Registry) Hook(path, reason string, limit time.Duration, cancel <-chan struct{}) error {
	return r.aside(&Spec{Argv: []string{path}, Cwd: "/", Env: map[string]string{"PANDASTACK_REASON": reason}}, limit, cancel)
}

// Rehearse runs the shortest program that there is anywhere, this one's file, as a command would be run. Errors as of Hook.
func (r *Registry) Rehearse(limit time.Duration, cancel <-chan struct{}) error {
	program, err := os.Executable()
	if err != nil {
		return faults.New("hook_failed", "%v", err)
	}
	return r.aside(&Spec{Argv: []string{program, "-version"}, Cwd: "/"}, limit, cancel)
}

// aside runs a program that is in no list and no count, also while others are frozen.
func (r *Registry) aside(spec *Spec, limit time.Duration, cancel <-chan struct{}) error {
	path := spec.Argv[0]
	user, err := FindUser("")
	if err != nil {
		return faults.New("hook_failed", "%s: %v", path, err)
	}
	process := newProcess(MinOutput)
	process.children, process.User, process.Argv, process.user, process.hook = r.children, user.Name, spec.Argv, user, true
	var random [8]byte
	_, _ = rand.Read(random[:])
	process.ID = "hook-" + hex.EncodeToString(random[:])
	r.setHook(process)
	defer r.setHook(nil)
	if err := r.run(process, spec); err != nil {
		return faults.New("hook_failed", "%v", faults.From(err).Message)
	}
	process.arm(limit)
	process.awaitSettled(limit, cancel)
	return process.verdict(path, limit, cancel)
}

func (r *Registry) setHook(process *Process) {
	r.mutex.Lock()
	r.hook = process
	r.mutex.Unlock()
}

// awaitSettled waits for the end of a process and of its output, which for one that is being killed may never come.
func (p *Process) awaitSettled(limit time.Duration, cancel <-chan struct{}) {
	last := limit + killBudget
	over := make(chan struct{})
	defer close(over)
	until := time.Now().Add(last)
	go func() {
		timer := time.NewTimer(last)
		defer timer.Stop()
		for {
			select {
			case <-cancel:
				cancel = nil
				_, _ = p.Signal(syscall.SIGKILL, true)
			case <-timer.C:
				p.wake()
				return
			case <-over:
				return
			}
		}
	}()
	p.mutex.Lock()
	defer p.mutex.Unlock()
	for !p.settled() && time.Now().Before(until) {
		p.changed.Wait()
	}
}

// verdict turns the end of a hook into its result, and lets go of its output: what it left behind may write on.
func (p *Process) verdict(path string, limit time.Duration, cancel <-chan struct{}) error {
	p.mutex.Lock()
	defer p.mutex.Unlock()
	defer p.forget()
	select {
	case <-cancel:
		return session.ErrAborted
	default:
	}
	how := "did not end when it was killed"
	switch {
	case p.exit == nil:
	case p.exit.Reason == "timeout":
		how = fmt.Sprintf("did not end within %s", limit)
	case p.exit.Signal != nil:
		how = fmt.Sprintf("was ended by signal %d", *p.exit.Signal)
	case *p.exit.ExitCode != 0:
		how = fmt.Sprintf("ended with exit code %d", *p.exit.ExitCode)
	default:
		return nil
	}
	said := ""
	text := make([]byte, memoryBytes)
	for index := range p.outputs {
		output := &p.outputs[index]
		_, count, _ := output.readAt(max(output.start, output.total-hookTail), text)
		said += string(text[:count])
	}
	return faults.New("hook_failed", "%s %s: %s", path, how, tail([]byte(said), hookTail))
}
