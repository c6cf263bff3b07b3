package processes

import (
	"errors"
	"io"
	"os"
	"sync"
	"syscall"
	"time"
	"unsafe"

	"pandastack/guest/internal/faults"
)

// settleAfter is how long END waits for outputs that a grandchild keeps open.
const settleAfter = 200 * time.Millisecond

// Exit is how a process ended; Stdout and Stderr are the offsets up to which the outputs were reported.
type Exit struct {
	ID         string `json:"id"`
	ExitCode   *int   `json:"exit_code"`
	Signal     *int   `json:"signal"`
	Reason     string `json:"reason"`
	Stdout     int64  `json:"stdout_bytes"`
	Stderr     int64  `json:"stderr_bytes"`
	DurationMS int64  `json:"duration_ms"`
}

// Process is one started program. Lifecycle: starting -> running -> exited (status known, the tree may live on) ->
// settled (its outputs are complete, END may be sent) -> forgotten by the registry.
type Process struct {
	ID      string
	Argv    []string
	User    string
	Baked   bool
	Warm    bool
	PTY     bool
	Started time.Time

	pid      int
	children *children
	user     User
	visible  bool // guarded by the registry
	hook     bool // in no list and no count

	mutex   sync.Mutex
	changed sync.Cond // outputs, readers or the exit changed
	outputs [2]output
	exit    *Exit // set at the exit; the byte counts follow when settled
	grace   bool  // settleAfter has passed since the exit
	killer  string
	timeout *time.Timer
	ends    time.Time // when the timeout will be over
	drop    bool      // the registry forgot it: pumps read on only to keep the pipe from filling

	stdinMutex sync.Mutex
	stdin      *os.File
	terminal   *os.File
}

func newProcess(limit int64) *Process {
	process := &Process{Started: time.Now()}
	process.changed.L = &process.mutex
	for index := range process.outputs {
		process.outputs[index].limit = limit
		process.outputs[index].readers = map[*reader]struct{}{}
	}
	return process
}

// pump moves what a process writes into its ring, as fast as readers allow.
func (p *Process) pump(index int, source *os.File) {
	defer source.Close()
	p.mutex.Lock()
	p.outputs[index].source = source
	p.mutex.Unlock()
	connection, err := source.SyscallConn()
	for err == nil {
		var chunk *[]byte
		var count int
		var readErr error
		// A buffer is taken only once there is something to read: a thousand idle processes cost no buffers.
		err = connection.Read(func(descriptor uintptr) bool {
			chunk = chunks.Get().(*[]byte)
			p.noteEmpty(index, false) // Before the bytes leave the pipe: in between they would be seen nowhere.
			count, readErr = ignoringInterrupts(func() (int, error) { return syscall.Read(int(descriptor), *chunk) })
			if readErr == syscall.EAGAIN {
				chunks.Put(chunk)
				chunk = nil
				p.noteEmpty(index, true)
				return false
			}
			return true
		})
		if err == nil && readErr != nil {
			err = readErr
		}
		if err == nil && count == 0 {
			err = io.EOF
		}
		if err == nil {
			p.store(index, (*chunk)[:count])
		}
		if chunk != nil {
			chunks.Put(chunk)
		}
	}
	p.mutex.Lock()
	p.outputs[index].closed = true
	p.outputs[index].source = nil
	p.settle()
	p.mutex.Unlock()
}

// chunks have room for a frame's header, so that one pool serves pumps and senders.
var chunks = sync.Pool{New: func() any {
	chunk := make([]byte, chunkBytes)
	return &chunk
}}

func ignoringInterrupts(call func() (int, error)) (int, error) {
	for {
		count, err := call()
		if err != syscall.EINTR {
			return count, err
		}
	}
}

func (p *Process) noteEmpty(index int, empty bool) {
	p.mutex.Lock()
	p.outputs[index].empty = empty
	p.settle()
	p.mutex.Unlock()
}

func (p *Process) store(index int, chunk []byte) {
	p.mutex.Lock()
	defer p.mutex.Unlock()
	output := &p.outputs[index]
	if p.exit != nil {
		output.overrun += len(chunk)
	}
	for !p.drop && !output.append(chunk) {
		// Blocked by a slow reader. If others wait for it, look again whether it has stalled.
		if len(output.readers) > 1 {
			output.releaseStalled(time.Now())
			time.AfterFunc(time.Second, p.wake)
		}
		p.changed.Wait()
	}
	p.settle()
	p.changed.Broadcast()
}

func (p *Process) wake() {
	p.mutex.Lock()
	p.changed.Broadcast()
	p.mutex.Unlock()
}

// settle decides whether what the main process wrote has been read; the mutex is held. The pipe holds at most 512 KiB
// of it at the exit (and one chunk may be in the pump's hands), so a grandchild that never stops writing cannot delay END.
func (p *Process) settle() {
	if p.exit == nil || p.settled() {
		return
	}
	for index := range p.outputs {
		output := &p.outputs[index]
		output.settled = output.settled || output.closed || p.grace && (output.empty || output.overrun > 1<<20)
	}
	if p.settled() {
		p.exit.Stdout, p.exit.Stderr = p.outputs[0].total, p.outputs[1].total
		p.changed.Broadcast()
	}
}

func (p *Process) settled() bool {
	return p.exit != nil && p.outputs[0].settled && p.outputs[1].settled
}

// pending says whether bytes wait in a pipe or terminal.
func pending(source *os.File) bool {
	connection, err := source.SyscallConn()
	if err != nil {
		return false
	}
	var count int32
	err = connection.Control(func(descriptor uintptr) {
		_ = ioctl(descriptor, syscall.TIOCINQ, uintptr(unsafe.Pointer(&count))) // FIONREAD by another name.
	})
	return err == nil && count > 0
}

// exited is called once, with the status of the main process.
func (p *Process) exited(status syscall.WaitStatus) {
	p.mutex.Lock()
	defer p.mutex.Unlock()
	exit := &Exit{ID: p.ID, DurationMS: time.Since(p.Started).Milliseconds()}
	if status.Signaled() {
		number := int(status.Signal())
		exit.Signal, exit.Reason = &number, "signaled"
		if p.killer != "" && status.Signal() == syscall.SIGKILL {
			exit.Reason = p.killer
		}
	} else {
		code := status.ExitStatus()
		exit.ExitCode, exit.Reason = &code, "exited"
	}
	p.exit = exit
	if p.timeout != nil {
		p.timeout.Stop()
	}
	p.settle()
	if !p.settled() {
		time.AfterFunc(settleAfter, func() {
			p.mutex.Lock()
			defer p.mutex.Unlock()
			p.grace = true
			for index := range p.outputs {
				// A busy machine may not have woken the pump for what arrived last.
				if p.outputs[index].source != nil && pending(p.outputs[index].source) {
					p.outputs[index].empty = false
				}
			}
			p.settle()
		})
	}
	p.changed.Broadcast()
	go p.closeInput()
}

// running says whether the main process has not been reaped.
func (p *Process) running() bool {
	p.mutex.Lock()
	defer p.mutex.Unlock()
	return p.exit == nil
}

// write feeds stdin. Bytes for a reader that is gone are dropped, as a shell's pipe would.
func (p *Process) write(chunk []byte) error {
	p.stdinMutex.Lock()
	defer p.stdinMutex.Unlock()
	if p.stdin == nil {
		return nil
	}
	_, err := p.stdin.Write(chunk)
	if errors.Is(err, syscall.EPIPE) || errors.Is(err, syscall.EIO) || errors.Is(err, os.ErrClosed) {
		return nil
	}
	return err
}

// endInput closes stdin; a terminal is told instead, because its one descriptor is also its output.
func (p *Process) endInput() {
	if p.PTY {
		_ = p.write([]byte{4})
		return
	}
	p.closeInput()
}

// closeInput does not wait for a writer that is blocked on a full pipe: closing wakes it.
func (p *Process) closeInput() {
	if p.stdin != nil && !p.PTY {
		_ = p.stdin.Close()
	}
}

// Resize tells the terminal its size.
func (p *Process) Resize(rows, cols uint16) error {
	if p.terminal == nil {
		return faults.New("no_pty", "process %s has no terminal", p.ID)
	}
	return setSize(p.terminal, rows, cols)
}
