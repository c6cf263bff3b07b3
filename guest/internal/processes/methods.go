package processes

import (
	"encoding/base64"
	"errors"
	"io"
	"syscall"
	"time"

	"pandastack/guest/internal/faults"
	"pandastack/guest/internal/frames"
	"pandastack/guest/internal/session"
)

const (
	maxSlice    = 128 << 10
	maxArgvText = 4 << 10
	listBatch   = 8
)

// Methods returns what a host may call; see PROTOCOL.md, section 5.
func (r *Registry) Methods() map[string]session.Method {
	return map[string]session.Method{
		"process.start":  r.callStart,
		"process.run":    r.callRun,
		"process.attach": r.callAttach,
		"process.stdin":  r.callStdin,
		"process.signal": r.callSignal,
		"process.wait":   r.callWait,
		"process.list":   r.callList,
		"process.resize": r.callResize,
		"process.output": r.callOutput,
		"machine.warm":   r.callWarm,
	}
}

type span struct {
	First int64 `json:"first"`
	Next  int64 `json:"next"`
}

type started struct {
	ID      string `json:"id"`
	PID     int    `json:"pid"`
	Started int64  `json:"started_unix_ns"`
	PTY     bool   `json:"pty"`
	Stdout  span   `json:"stdout"`
	Stderr  span   `json:"stderr"`
}

func (p *Process) describe() started {
	p.mutex.Lock()
	defer p.mutex.Unlock()
	out, err := &p.outputs[0], &p.outputs[1]
	return started{ID: p.ID, PID: p.pid, Started: p.Started.UnixNano(), PTY: p.PTY,
		Stdout: span{out.oldest(), out.total}, Stderr: span{err.oldest(), err.total}}
}

func params[T any](raw []byte) (*T, error) {
	into := new(T)
	if err := frames.Unmarshal(raw, into); err != nil {
		return nil, faults.Invalid("params: %v", err)
	}
	return into, nil
}

func (r *Registry) callStart(stream *session.Stream, raw []byte) error {
	spec, err := params[Spec](raw)
	if err != nil {
		return err
	}
	if spec.OnDetach != "" {
		return faults.Invalid("on_detach is for process.run")
	}
	process, err := r.start(spec, stream.Done())
	if err != nil {
		return err
	}
	return stream.Answer(process.describe())
}

func (r *Registry) callRun(stream *session.Stream, raw []byte) error {
	spec, err := params[Spec](raw)
	if err != nil {
		return err
	}
	process, err := r.prepare(spec)
	if err != nil {
		return err
	}
	attachment := process.attach([2]*int64{})
	if err := r.begin(process, spec, stream.Done()); err != nil {
		return err
	}
	if err := stream.Reply(process.describe()); err != nil {
		attachment.leave()
		return process.detached(spec, err)
	}
	if spec.Stdin {
		go process.feed(stream)
	}
	return process.detached(spec, attachment.follow(stream))
}

func (p *Process) detached(spec *Spec, err error) error {
	if errors.Is(err, session.ErrAborted) && spec.OnDetach == "kill" {
		_, _ = p.Signal(syscall.SIGKILL, true)
	}
	return err
}

// feed copies the host's DATA to stdin; an aborted stream leaves stdin open, because another host may go on.
func (p *Process) feed(stream *session.Stream) {
	if _, err := p.copyInput(stream); err == nil {
		p.endInput()
	}
}

func (p *Process) copyInput(stream *session.Stream) (int64, error) {
	var total int64
	for {
		chunk, err := stream.Receive()
		if errors.Is(err, io.EOF) {
			return total, nil
		}
		if err != nil {
			return total, err
		}
		if err := p.write(chunk); err != nil {
			return total, err
		}
		total += int64(len(chunk))
	}
}

func (r *Registry) callAttach(stream *session.Stream, raw []byte) error {
	wanted, err := params[struct {
		ID     string `json:"id"`
		Stdout *int64 `json:"stdout_offset"`
		Stderr *int64 `json:"stderr_offset"`
	}](raw)
	if err != nil {
		return err
	}
	process, err := r.find(wanted.ID)
	if err != nil {
		return err
	}
	attachment := process.attach([2]*int64{wanted.Stdout, wanted.Stderr})
	if err := stream.Reply(process.describe()); err != nil {
		attachment.leave()
		return err
	}
	return attachment.follow(stream)
}

func (r *Registry) callStdin(stream *session.Stream, raw []byte) error {
	wanted, err := params[struct {
		ID       string `json:"id"`
		KeepOpen bool   `json:"keep_open"`
	}](raw)
	if err != nil {
		return err
	}
	process, err := r.find(wanted.ID)
	if err != nil {
		return err
	}
	if process.stdin == nil {
		return faults.New("no_stdin", "process %s was started without stdin", process.ID)
	}
	if !process.running() {
		return faults.New("finished", "process %s has ended", process.ID)
	}
	total, err := process.copyInput(stream)
	if err != nil {
		return err
	}
	if !wanted.KeepOpen {
		process.endInput()
	}
	return stream.Answer(map[string]int64{"bytes": total})
}

func (r *Registry) callSignal(stream *session.Stream, raw []byte) error {
	wanted, err := params[struct {
		ID     string `json:"id"`
		Signal int    `json:"signal"`
		Tree   bool   `json:"tree"`
	}](raw)
	if err != nil {
		return err
	}
	if wanted.Signal < 1 || wanted.Signal > 64 {
		return faults.Invalid("signal %d", wanted.Signal)
	}
	process, err := r.find(wanted.ID)
	if err != nil {
		return err
	}
	sent, err := process.Signal(syscall.Signal(wanted.Signal), wanted.Tree)
	if err != nil {
		return err
	}
	return stream.Answer(map[string]int{"sent": sent})
}

func (r *Registry) callWait(stream *session.Stream, raw []byte) error {
	wanted, err := params[struct {
		ID string `json:"id"`
	}](raw)
	if err != nil {
		return err
	}
	process, err := r.find(wanted.ID)
	if err != nil {
		return err
	}
	answered := make(chan struct{})
	defer close(answered)
	go func() {
		select {
		case <-stream.Done():
			process.wake()
		case <-answered:
		}
	}()
	process.mutex.Lock()
	for !process.settled() {
		select {
		case <-stream.Done():
			process.mutex.Unlock()
			return session.ErrAborted
		default:
			process.changed.Wait()
		}
	}
	exit := *process.exit
	process.mutex.Unlock()
	return stream.Answer(exit)
}

type listed struct {
	started
	Argv    []string `json:"argv"`
	User    string   `json:"user"`
	Baked   bool     `json:"baked"`
	Warm    bool     `json:"warm"`
	Running bool     `json:"running"`
	Exit    *Exit    `json:"exit"`
}

func (p *Process) list() listed {
	entry := listed{started: p.describe(), Argv: []string{}, User: p.User, Baked: p.Baked, Warm: p.Warm}
	room := maxArgvText
	for _, argument := range p.Argv {
		if len(argument) > room {
			argument = argument[:room]
		}
		if entry.Argv = append(entry.Argv, argument); len(argument) == room {
			break
		}
		room -= len(argument)
	}
	p.mutex.Lock()
	defer p.mutex.Unlock()
	entry.Running = p.exit == nil
	if p.exit != nil {
		exit := *p.exit
		entry.Exit = &exit
	}
	return entry
}

func (r *Registry) callList(stream *session.Stream, raw []byte) error {
	if _, err := params[struct{}](raw); err != nil {
		return err
	}
	if err := stream.Reply(struct{}{}); err != nil {
		return err
	}
	all := r.all()
	for len(all) > 0 {
		size := min(listBatch, len(all))
		batch := make([]listed, size)
		for index, process := range all[:size] {
			batch[index] = process.list()
		}
		all = all[size:]
		if err := stream.SendJSON(map[string][]listed{"processes": batch}); err != nil {
			return err
		}
	}
	return stream.End(nil)
}

func (r *Registry) callResize(stream *session.Stream, raw []byte) error {
	wanted, err := params[struct {
		ID string `json:"id"`
		Size
	}](raw)
	if err != nil {
		return err
	}
	process, err := r.find(wanted.ID)
	if err != nil {
		return err
	}
	if err := process.Resize(wanted.Rows, wanted.Cols); err != nil {
		return err
	}
	return stream.Answer(struct{}{})
}

func (r *Registry) callOutput(stream *session.Stream, raw []byte) error {
	wanted, err := params[struct {
		ID     string `json:"id"`
		Stream int    `json:"stream"`
		Offset int64  `json:"offset"`
		Limit  int64  `json:"limit"`
	}](raw)
	if err != nil {
		return err
	}
	if wanted.Stream < 1 || wanted.Stream > 2 || wanted.Offset < 0 || wanted.Limit < 0 || wanted.Limit > maxSlice {
		return faults.Invalid("stream is 1 or 2, limit at most %d", maxSlice)
	}
	process, err := r.find(wanted.ID)
	if err != nil {
		return err
	}
	slice := make([]byte, wanted.Limit)
	process.mutex.Lock()
	output := &process.outputs[wanted.Stream-1]
	at, filled := min(max(wanted.Offset, output.oldest()), output.total), 0
	first, next := output.oldest(), output.total
	for err == nil && filled < len(slice) && at+int64(filled) < next {
		var count int
		_, count, err = output.readAt(at+int64(filled), slice[filled:])
		filled += count
	}
	process.mutex.Unlock()
	if err != nil {
		return err
	}
	return stream.Answer(map[string]any{"offset": at, "first": first, "next": next,
		"data_b64": base64.StdEncoding.EncodeToString(slice[:filled])})
}

func (r *Registry) callWarm(stream *session.Stream, raw []byte) error {
	wanted, err := params[struct {
		Argv  []string          `json:"argv"`
		Env   map[string]string `json:"env"`
		Ready int64             `json:"ready_timeout_ms"`
	}](raw)
	if err != nil {
		return err
	}
	process, err := r.bake(wanted.Argv, wanted.Env, time.Duration(wanted.Ready)*time.Millisecond, stream.Done())
	if err != nil {
		return err
	}
	return stream.Answer(process.describe())
}
