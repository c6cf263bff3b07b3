package session

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"io"
	"sync"

	"pandastack/guest/internal/faults"
	"pandastack/guest/internal/frames"
)

// ErrAborted means that the host reset the stream or the session ended; there is nobody left to tell.
var ErrAborted = errors.New("stream aborted")

// Chunk is the most payload one DATA frame of ours carries.
const Chunk = 240 << 10

// Stream is one call. A handler runs in its own goroutine and may use it from several.
type Stream struct {
	ID      uint32
	session *Session

	mutex    sync.Mutex
	changed  sync.Cond
	credit   int      // bytes we may still send
	allowed  int      // bytes the host may still send
	consumed int      // bytes taken by the handler and not yet given back as credit
	inbox    [][]byte // at most a window
	ended    bool     // the host will send no more
	aborted  bool
	finished bool
	done     chan struct{}
}

func newStream(session *Session, id uint32, ended bool) *Stream {
	stream := &Stream{ID: id, session: session, credit: frames.Window, allowed: frames.Window, ended: ended,
		done: make(chan struct{})}
	stream.changed.L = &stream.mutex
	return stream
}

// Done is closed when the stream is aborted.
func (s *Stream) Done() <-chan struct{} { return s.done }

// Aborted says the same at once.
func (s *Stream) Aborted() bool {
	select {
	case <-s.done:
		return true
	default:
		return false
	}
}

func (s *Stream) abort() {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	if !s.aborted {
		s.aborted = true
		s.inbox = nil
		close(s.done)
		s.changed.Broadcast()
	}
}

// Receive returns the next bytes from the host, io.EOF after the last.
func (s *Stream) Receive() ([]byte, error) {
	s.mutex.Lock()
	for len(s.inbox) == 0 && !s.ended && !s.aborted {
		s.changed.Wait()
	}
	if s.aborted {
		s.mutex.Unlock()
		return nil, ErrAborted
	}
	if len(s.inbox) == 0 {
		s.mutex.Unlock()
		return nil, io.EOF
	}
	chunk := s.inbox[0]
	s.inbox = s.inbox[1:]
	s.consumed += len(chunk)
	give := 0
	if s.consumed >= frames.Window/4 && !s.ended {
		give, s.consumed = s.consumed, 0
		s.allowed += give
	}
	s.mutex.Unlock()
	if give > 0 {
		payload := binary.BigEndian.AppendUint32(nil, uint32(give))
		return chunk, s.send(frames.Credit, 0, payload)
	}
	return chunk, nil
}

// accept takes a DATA payload from the reader; false means that the host broke its credit.
func (s *Stream) accept(payload []byte) bool {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	s.allowed -= len(payload)
	if s.allowed < 0 || s.ended {
		return false
	}
	if len(payload) > 0 && !s.aborted {
		s.inbox = append(s.inbox, payload)
		s.changed.Broadcast()
	}
	return true
}

func (s *Stream) endOfInput() {
	s.mutex.Lock()
	s.ended = true
	s.changed.Broadcast()
	s.mutex.Unlock()
}

func (s *Stream) addCredit(bytes int) bool {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	s.credit += bytes
	s.changed.Broadcast()
	return s.credit <= 16*frames.Window
}

// Reserve waits for credit of at least `least` bytes and takes up to `most` of it.
func (s *Stream) Reserve(least, most int) (int, error) {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	for s.credit < least && !s.aborted {
		s.changed.Wait()
	}
	if s.aborted {
		return 0, ErrAborted
	}
	granted := min(most, s.credit)
	s.credit -= granted
	return granted, nil
}

// Refund gives back credit that was reserved and not used.
func (s *Stream) Refund(bytes int) {
	if bytes > 0 {
		s.mutex.Lock()
		s.credit += bytes
		s.changed.Broadcast()
		s.mutex.Unlock()
	}
}

// SendReserved sends length bytes of payload that lie at buffer[frames.HeaderSize:], under credit reserved before.
func (s *Stream) SendReserved(channel uint8, buffer []byte, length int) error {
	frame := frames.Put(buffer, frames.Data, channel, s.ID, length, s.session.tag)
	return s.session.out.send(s.session, false, frame)
}

// SendJSON sends one value as a line in one DATA frame on channel 0; callers keep batches well below a frame.
func (s *Stream) SendJSON(value any) error {
	payload, err := json.Marshal(value)
	if err != nil {
		return err
	}
	if payload = append(payload, '\n'); len(payload) > frames.MaxPayload {
		return faults.New("too_large", "a batch of %d bytes", len(payload))
	}
	if _, err := s.Reserve(len(payload), len(payload)); err != nil {
		return err
	}
	return s.session.out.send(s.session, false, frames.Encode(
		frames.Frame{Kind: frames.Data, Stream: s.ID, Payload: payload}, s.session.tag))
}

func (s *Stream) send(kind frames.Kind, flags uint8, payload []byte) error {
	return s.session.out.send(s.session, true, frames.Encode(
		frames.Frame{Kind: kind, Flags: flags, Stream: s.ID, Payload: payload}, s.session.tag))
}

// Reply answers a call that goes on with DATA.
func (s *Stream) Reply(value any) error {
	payload, err := json.Marshal(value)
	if err != nil {
		return err
	}
	return s.send(frames.Reply, 0, payload)
}

// Answer replies and completes the call.
func (s *Stream) Answer(value any) error { return s.finish(frames.Reply, frames.FlagLast, value) }

// End completes the call after its last DATA.
func (s *Stream) End(value any) error { return s.finish(frames.End, 0, value) }

func (s *Stream) fail(err error) {
	if errors.Is(err, ErrAborted) {
		_ = s.finish(frames.Reset, 0, nil)
		return
	}
	_ = s.finish(frames.Error, 0, faults.From(err))
}

func (s *Stream) finish(kind frames.Kind, flags uint8, value any) error {
	var payload []byte
	if value != nil {
		var err error
		if payload, err = json.Marshal(value); err != nil {
			return err
		}
		if len(payload) > frames.MaxPayload {
			return faults.New("too_large", "an answer of %d bytes", len(payload))
		}
	}
	s.mutex.Lock()
	again := s.finished
	s.finished = true
	s.mutex.Unlock()
	if again {
		return nil
	}
	// Forgotten before the host hears of it, so that a host at its limit of streams may open the next one at once.
	s.session.forget(s)
	return s.send(kind, flags, payload)
}
