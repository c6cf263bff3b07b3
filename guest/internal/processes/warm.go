package processes

import (
	"bufio"
	"bytes"
	"encoding/json"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"pandastack/guest/internal/faults"
	"pandastack/guest/warm"
)

const (
	warmDirectory = "/run/pandastack" // 0700: whoever may connect may run code as any user.
	warmSocket    = "PANDASTACK_WARM_SOCKET"
	warmMark      = "PANDASTACK_WARM_MARK" // Room in /proc/PID/environ, where a fork writes the marker of its run.
	warmPython    = "pandastack:python"
	warmPatience  = 10 * time.Second
	lostPoll      = 100 * time.Millisecond
	maxReady      = 10 * time.Minute
	maxReadyText  = 64 << 10
	readyTail     = 1000
)

// interpreter is a baked process that forks on request.
type interpreter struct {
	process     *Process
	socket      string
	program     string            // what `python3` meant to it
	environment map[string]string // with what it was started
}

// bake starts a process that may outlive a seal, and waits until it says that it is ready.
func (r *Registry) bake(argv []string, env map[string]string, patience time.Duration, cancel <-chan struct{}) (*Process, error) {
	if len(argv) == 0 || patience <= 0 || patience > maxReady {
		return nil, faults.Invalid("argv or ready_timeout_ms")
	}
	python := argv[0] == warmPython
	if python {
		argv = append([]string{"python3", "-c", warm.Python}, argv[1:]...)
	}
	if err := os.MkdirAll(warmDirectory, 0o700); err != nil {
		return nil, err
	}
	if err := os.Chmod(warmDirectory, 0o700); err != nil {
		return nil, err
	}
	directory, err := os.MkdirTemp(warmDirectory, "warm-")
	if err != nil {
		return nil, err
	}
	socket := filepath.Join(directory, "socket")
	spec := &Spec{Argv: argv, Env: map[string]string{}, Cwd: "/", baked: true}
	for name, value := range env {
		spec.Env[name] = value
	}
	spec.Env[warmSocket] = socket
	spec.Env[warmMark] = strings.Repeat("-", len(marker)+1+maxIDLength)
	process, err := r.start(spec, cancel)
	if err == nil {
		err = process.awaitReady(patience, cancel)
	}
	if err != nil {
		if process != nil {
			_, _ = process.Signal(syscall.SIGKILL, true)
		}
		_ = os.RemoveAll(directory)
		return nil, err
	}
	go func() {
		process.awaitExit()
		_ = os.RemoveAll(directory)
	}()
	if _, err := os.Stat(socket); err == nil && python {
		environment := r.environment(spec, User{}, process.ID)
		program, _ := findProgram("python3", environment["PATH"], "/")
		r.mutex.Lock()
		r.warm = &interpreter{process: process, socket: socket, program: program, environment: environment}
		r.mutex.Unlock()
	}
	return process, nil
}

// awaitReady waits for the line `ready` on stdout.
func (p *Process) awaitReady(patience time.Duration, cancel <-chan struct{}) error {
	deadline := time.Now().Add(patience)
	over := make(chan struct{})
	defer close(over)
	go func() {
		timer := time.NewTimer(patience)
		defer timer.Stop()
		select {
		case <-cancel:
		case <-timer.C:
		case <-over:
			return
		}
		p.wake()
	}()
	p.mutex.Lock()
	defer p.mutex.Unlock()
	text := make([]byte, maxReadyText)
	for {
		_, count, err := p.outputs[0].readAt(0, text)
		if err != nil {
			return err
		}
		for line := range bytes.Lines(text[:count]) {
			if string(line) == "ready\n" {
				return nil
			}
		}
		_, said, _ := p.outputs[1].readAt(0, text)
		if p.exit != nil {
			return faults.New("spawn_failed", "ended before it was ready: %s", tail(text[:said], readyTail))
		}
		if !time.Now().Before(deadline) {
			return faults.New("spawn_failed", "not ready in time: %s", tail(text[:said], readyTail))
		}
		select {
		case <-cancel:
			return faults.New("aborted", "the host hung up")
		default:
		}
		p.changed.Wait()
	}
}

func (p *Process) awaitExit() {
	p.mutex.Lock()
	defer p.mutex.Unlock()
	for p.exit == nil {
		p.changed.Wait()
	}
}

func tail(text []byte, limit int) string {
	return strings.ToValidUTF8(string(text[max(0, len(text)-limit):]), "?")
}

func (r *Registry) interpreter() *interpreter {
	r.mutex.Lock()
	defer r.mutex.Unlock()
	if r.warm != nil && !r.warm.process.running() {
		r.warm = nil
	}
	return r.warm
}

// suits says whether a fork would behave as a fresh `python3`: the same program, and no setting that Python reads only
// when it starts.
func (i *interpreter) suits(environment map[string]string, cwd string) bool {
	program, err := findProgram("python3", environment["PATH"], cwd)
	if err != nil || program != i.program {
		return false
	}
	startup := func(name string) bool {
		return strings.HasPrefix(name, "PYTHON") || strings.HasPrefix(name, "LC_") || name == "LANG" || name == "VIRTUAL_ENV"
	}
	for name, value := range environment {
		if startup(name) && i.environment[name] != value {
			return false
		}
	}
	for name, value := range i.environment {
		if startup(name) && environment[name] != value {
			return false
		}
	}
	return true
}

type warmRequest struct {
	Code   string            `json:"code"`
	Cwd    string            `json:"cwd"`
	Env    map[string]string `json:"env"`
	UID    uint32            `json:"uid"`
	GID    uint32            `json:"gid"`
	Groups []uint32          `json:"groups"`
}

type warmAnswer struct {
	PID    int    `json:"pid"`
	Error  string `json:"error"`
	Errno  int    `json:"errno"`
	Status *int   `json:"status"`
}

// fork runs code in a fork. False: the interpreter could not be asked, and the code has not run.
func (i *interpreter) fork(r *Registry, process *Process, code, cwd string, environment map[string]string, user User,
	files *stdio) (bool, error) {
	if !i.suits(environment, cwd) {
		return false, nil
	}
	connection, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: i.socket, Net: "unix"})
	if err != nil {
		return false, nil
	}
	answers := bufio.NewReader(connection)
	answer, err := i.ask(connection, answers, warmRequest{code, cwd, environment, user.UID, user.GID, user.Groups}, files)
	if err != nil {
		_ = connection.Close()
		return false, nil
	}
	if answer.PID <= 0 {
		_ = connection.Close()
		return true, &faults.Fault{Code: "bad_cwd", Message: answer.Error, Errno: answer.Errno}
	}
	process.Warm, process.Argv = true, []string{"python3", "-c", code}
	r.children.mutex.Lock()
	process.pid = answer.PID
	// Should the interpreter die, its forks become our children, and the reaper will report them.
	r.children.byPID[answer.PID] = func(status syscall.WaitStatus) { r.finished(process, status) }
	r.children.mutex.Unlock()
	go r.awaitFork(connection, answers, answer.PID)
	return true, nil
}

func (i *interpreter) ask(connection *net.UnixConn, answers *bufio.Reader, request warmRequest, files *stdio) (warmAnswer, error) {
	var answer warmAnswer
	if request.Groups == nil {
		request.Groups = []uint32{}
	}
	line, err := json.Marshal(request)
	if err != nil {
		return answer, err
	}
	line = append(line, '\n')
	rights := syscall.UnixRights(int(files.theirs[0].Fd()), int(files.theirs[1].Fd()), int(files.theirs[2].Fd()))
	_ = connection.SetDeadline(time.Now().Add(warmPatience))
	written, _, err := connection.WriteMsgUnix(line, rights, nil)
	if err == nil && written < len(line) {
		_, err = connection.Write(line[written:])
	}
	if err != nil {
		return answer, err
	}
	return answer, readAnswer(answers, &answer)
}

func readAnswer(answers *bufio.Reader, into *warmAnswer) error {
	line, err := answers.ReadBytes('\n')
	if err != nil {
		return err
	}
	return json.Unmarshal(line, into)
}

// awaitFork waits for the end of a fork. The interpreter keeps it a zombie until we hang up, so its pid is its own for
// as long as it is in the children's map.
func (r *Registry) awaitFork(connection *net.UnixConn, answers *bufio.Reader, pid int) {
	defer connection.Close()
	_ = connection.SetDeadline(time.Time{})
	var answer warmAnswer
	if err := readAnswer(answers, &answer); err != nil || answer.Status == nil {
		// The interpreter died, and the reaper will report its forks; or it lives and has lost this one, whose end is then
		// only seen by its absence.
		for r.children.has(pid) && runs(pid) {
			time.Sleep(lostPoll)
		}
		lost := int(syscall.SIGKILL)
		answer.Status = &lost
	}
	r.children.mutex.Lock()
	defer r.children.mutex.Unlock()
	if exited := r.children.byPID[pid]; exited != nil {
		delete(r.children.byPID, pid)
		exited(syscall.WaitStatus(*answer.Status))
	}
}
