package processes

import (
	"encoding/base64"
	"maps"
	"os"
	"strings"
	"syscall"
	"time"

	"pandastack/guest/internal/faults"
)

const (
	defaultPath   = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
	pipeBytes     = 512 << 10
	setPipeSize   = 1031     // F_SETPIPE_SZ
	maxInlineSize = 64 << 10 // What an empty pipe takes without a reader.
)

// Size is that of a terminal.
type Size struct {
	Rows uint16 `json:"rows"`
	Cols uint16 `json:"cols"`
}

// Spec is what process.start and process.run take; see PROTOCOL.md, section 5.
type Spec struct {
	ID          string            `json:"id"`
	Argv        []string          `json:"argv"`
	Shell       string            `json:"shell"`
	Warm        *WarmCode         `json:"warm"`
	Cwd         string            `json:"cwd"`
	Env         map[string]string `json:"env"`
	User        string            `json:"user"`
	Stdin       bool              `json:"stdin"`
	StdinB64    *string           `json:"stdin_b64"`
	PTY         *Size             `json:"pty"`
	TimeoutMS   int64             `json:"timeout_ms"`
	OutputLimit int64             `json:"output_limit_bytes"`
	OnDetach    string            `json:"on_detach"`

	baked bool
}

// WarmCode runs in a fork of the warm interpreter, or by `python3 -c` if there is none.
type WarmCode struct {
	Code string `json:"code"`
}

func (s *Spec) check() error {
	forms := 0
	for _, given := range []bool{len(s.Argv) > 0, s.Shell != "", s.Warm != nil} {
		if given {
			forms++
		}
	}
	if forms != 1 {
		return faults.Invalid("exactly one of argv, shell and warm")
	}
	if s.Stdin && s.StdinB64 != nil {
		return faults.Invalid("stdin and stdin_b64")
	}
	if s.TimeoutMS < 0 || s.TimeoutMS > 1<<40 {
		return faults.Invalid("timeout_ms")
	}
	if s.OutputLimit == 0 {
		s.OutputLimit = DefaultOutput
	}
	if s.OutputLimit < MinOutput || s.OutputLimit > MaxOutput {
		return faults.Invalid("output_limit_bytes is from %d to %d", MinOutput, MaxOutput)
	}
	if s.OnDetach != "" && s.OnDetach != "keep" && s.OnDetach != "kill" {
		return faults.Invalid("on_detach is keep or kill")
	}
	for name, value := range s.Env {
		if name == "" || strings.ContainsAny(name, "=\x00") || strings.ContainsRune(value, 0) {
			return faults.Invalid("env %.80q", name)
		}
	}
	for _, argument := range append(s.Argv, s.Shell, s.Cwd) {
		if strings.ContainsRune(argument, 0) {
			return faults.Invalid("a NUL byte in argv, shell or cwd")
		}
	}
	if s.Cwd != "" && !strings.HasPrefix(s.Cwd, "/") {
		return faults.Invalid("cwd is absolute")
	}
	return nil
}

func (s *Spec) command() []string {
	switch {
	case s.Shell != "":
		if _, err := os.Stat("/bin/bash"); err == nil {
			return []string{"/bin/bash", "-c", s.Shell}
		}
		return []string{"/bin/sh", "-c", s.Shell}
	case s.Warm != nil:
		return []string{"python3", "-c", s.Warm.Code}
	}
	return s.Argv
}

// environment joins, weakest first: the daemon's own (the image's), the user's, identity's, the caller's.
func (r *Registry) environment(spec *Spec, user User, id string) map[string]string {
	environment := map[string]string{"PATH": defaultPath}
	for _, entry := range os.Environ() {
		if name, value, ok := strings.Cut(entry, "="); ok && !strings.HasPrefix(name, "PANDASTACK_") {
			environment[name] = value
		}
	}
	environment["HOME"], environment["USER"], environment["LOGNAME"] = user.Home, user.Name, user.Name
	if user.Shell != "" {
		environment["SHELL"] = user.Shell
	}
	if spec.PTY != nil {
		environment["TERM"] = "xterm-256color"
	}
	r.mutex.Lock()
	maps.Copy(environment, r.machine)
	r.mutex.Unlock()
	maps.Copy(environment, spec.Env)
	environment[marker] = id // The tree is found by it, so nobody may change it.
	return environment
}

func (s *Spec) directory(user User) string {
	if s.Cwd != "" {
		return s.Cwd
	}
	if info, err := os.Stat(user.Home); err == nil && info.IsDir() {
		return user.Home
	}
	return "/"
}

// stdio is the ends of pipes: `ours` for pumps and stdin, `theirs` for the child.
type stdio struct {
	theirs  [3]*os.File
	outputs [2]*os.File
	stdin   *os.File
}

func (s *stdio) closeTheirs() {
	closed := map[*os.File]bool{}
	for _, file := range s.theirs {
		if file != nil && !closed[file] {
			closed[file] = true
			_ = file.Close()
		}
	}
}

func (s *stdio) closeOurs() {
	for _, file := range []*os.File{s.outputs[0], s.outputs[1], s.stdin} {
		if file != nil {
			_ = file.Close()
		}
	}
}

// pipe returns a pipe whose `ours` end goes to the poller; the child's end stays blocking, they are two descriptions.
func pipe(weRead bool) (ours, theirs *os.File, err error) {
	var ends [2]int
	if err := syscall.Pipe2(ends[:], syscall.O_CLOEXEC); err != nil {
		return nil, nil, err
	}
	mine, other := ends[0], ends[1]
	if !weRead {
		mine, other = other, mine
	}
	if weRead {
		// A writer that fills the pipe must be woken, which under gVisor costs more than moving what is in it. A kernel
		// that refuses leaves it at 64 KiB.
		_, _, _ = syscall.Syscall(syscall.SYS_FCNTL, uintptr(mine), setPipeSize, pipeBytes)
	}
	if err := syscall.SetNonblock(mine, true); err != nil {
		_ = syscall.Close(mine)
		_ = syscall.Close(other)
		return nil, nil, err
	}
	return os.NewFile(uintptr(mine), "pipe"), os.NewFile(uintptr(other), "pipe"), nil
}

func (s *Spec) open(user User) (io stdio, err error) {
	defer func() {
		if err != nil {
			io.closeTheirs()
			io.closeOurs()
		}
	}()
	if s.PTY != nil {
		master, terminal, err := openPTY(s.PTY.Rows, s.PTY.Cols, user)
		if err != nil {
			return io, err
		}
		io.theirs = [3]*os.File{terminal, terminal, terminal}
		io.outputs[0], io.stdin = master, master
		return io, nil
	}
	switch {
	case s.StdinB64 != nil:
		bytes, err := base64.StdEncoding.DecodeString(*s.StdinB64)
		if err != nil || len(bytes) > maxInlineSize {
			return io, faults.Invalid("stdin_b64 is base64 of at most %d bytes", maxInlineSize)
		}
		var ours *os.File
		if ours, io.theirs[0], err = pipe(false); err != nil {
			return io, err
		}
		_, err = ours.Write(bytes)
		_ = ours.Close()
		if err != nil {
			return io, err
		}
	case s.Stdin:
		if io.stdin, io.theirs[0], err = pipe(false); err != nil {
			return io, err
		}
	default:
		if io.theirs[0], err = os.Open(os.DevNull); err != nil {
			return io, err
		}
	}
	for index := range io.outputs {
		if io.outputs[index], io.theirs[index+1], err = pipe(true); err != nil {
			return io, err
		}
	}
	return io, nil
}

// start runs a program. When it returns without error, the process is in the list and its outputs are being read.
func (r *Registry) start(spec *Spec, cancel <-chan struct{}) (*Process, error) {
	process, err := r.prepare(spec)
	if err != nil {
		return nil, err
	}
	if err := r.begin(process, spec, cancel); err != nil {
		return nil, err
	}
	return process, nil
}

// prepare returns a process that does not run yet, so that it can be attached to before its first byte.
func (r *Registry) prepare(spec *Spec) (*Process, error) {
	if err := spec.check(); err != nil {
		return nil, err
	}
	user, err := FindUser(spec.User)
	if err != nil {
		return nil, err
	}
	process := newProcess(spec.OutputLimit)
	process.children, process.User, process.PTY, process.Baked = r.children, user.Name, spec.PTY != nil, spec.baked
	process.Argv, process.user = spec.command(), user
	if err := r.claim(process, spec.ID); err != nil {
		return nil, err
	}
	return process, nil
}

// begin runs a prepared process, or forgets it. It waits while processes are frozen, until `cancel` closes.
func (r *Registry) begin(process *Process, spec *Spec, cancel <-chan struct{}) error {
	if err := r.enter(cancel); err != nil {
		r.abandon(process)
		return err
	}
	defer r.leave()
	if err := r.run(process, spec); err != nil {
		r.abandon(process)
		return err
	}
	r.publish(process)
	process.arm(time.Duration(spec.TimeoutMS) * time.Millisecond)
	return nil
}

// run starts the program, and the reading of its outputs.
func (r *Registry) run(process *Process, spec *Spec) error {
	io, err := spec.open(process.user)
	if err != nil {
		return err
	}
	process.stdin = io.stdin
	if spec.PTY != nil {
		process.terminal = io.outputs[0]
	}
	err = r.launch(process, spec, process.user, &io)
	io.closeTheirs()
	if err != nil {
		io.closeOurs()
		return err
	}
	for index, source := range io.outputs {
		if source != nil {
			go process.pump(index, source)
		} else {
			process.mutex.Lock()
			process.outputs[index].closed = true
			process.settle()
			process.mutex.Unlock()
		}
	}
	return nil
}

func (r *Registry) launch(process *Process, spec *Spec, user User, io *stdio) error {
	environment := r.environment(spec, user, process.ID)
	cwd := spec.directory(user)
	if spec.Warm != nil && spec.PTY == nil {
		if interpreter := r.interpreter(); interpreter != nil {
			done, err := interpreter.fork(r, process, spec.Warm.Code, cwd, environment, user, io)
			if done {
				return err
			}
			// An interpreter that is gone or busy costs speed, not the run.
		}
	}
	program, err := findProgram(process.Argv[0], environment["PATH"], cwd)
	if err != nil {
		return err
	}
	variables := make([]string, 0, len(environment))
	for name, value := range environment {
		variables = append(variables, name+"="+value)
	}
	attributes := &syscall.SysProcAttr{Setsid: true}
	if spec.PTY != nil {
		attributes.Setctty = true
	}
	if process.Baked {
		attributes.Pdeathsig = syscall.SIGKILL // It serves the daemon and is of no use without it.
	}
	if user.UID != 0 || user.GID != 0 || syscall.Getuid() == 0 {
		attributes.Credential = &syscall.Credential{Uid: user.UID, Gid: user.GID, Groups: user.Groups,
			NoSetGroups: syscall.Getuid() != 0}
	}
	err = r.spawner.spawn(spawnRequest{
		program: program,
		argv:    process.Argv,
		attr: &syscall.ProcAttr{Dir: cwd, Env: variables, Sys: attributes,
			Files: []uintptr{io.theirs[0].Fd(), io.theirs[1].Fd(), io.theirs[2].Fd()}},
		started: func(pid int) {
			process.pid = pid
			r.children.byPID[pid] = func(status syscall.WaitStatus) { r.finished(process, status) }
		},
	})
	if err != nil {
		return spawnFault(program, cwd, err)
	}
	return nil
}

// arm starts the clock of a process with a time limit.
func (p *Process) arm(limit time.Duration) {
	if limit <= 0 {
		return
	}
	p.mutex.Lock()
	defer p.mutex.Unlock()
	if p.exit == nil {
		p.ends = time.Now().Add(limit)
		p.timeout = time.AfterFunc(limit, func() {
			p.blame("timeout")
			_, _ = p.Signal(syscall.SIGKILL, true)
		})
	}
}

// pauseTimeout stops the clock and returns what is left; false: there is none, or it is over.
func (p *Process) pauseTimeout() (time.Duration, bool) {
	p.mutex.Lock()
	defer p.mutex.Unlock()
	if p.timeout == nil || !p.timeout.Stop() {
		return 0, false
	}
	return max(0, time.Until(p.ends)), true
}

func (p *Process) resumeTimeout(left time.Duration) {
	p.mutex.Lock()
	defer p.mutex.Unlock()
	if p.exit == nil {
		p.ends = time.Now().Add(left)
		p.timeout.Reset(left)
	}
}
