// Package session turns a byte stream into calls: handshake, streams, credit, and the one fair writer. What the calls
// do is given to it as a table of methods.
package session

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"io"
	"runtime/debug"
	"sync"

	"pandastack/guest/internal/faults"
	"pandastack/guest/internal/frames"
)

const maxStreams = 1024

// Method answers one call: with Answer, End, or by returning an error.
type Method func(stream *Stream, params []byte) error

// Server is what all carriers share.
type Server struct {
	Methods map[string]Method
	Welcome func(nonce string) any  // the body of HELLO_OK
	Token   func(token string) bool // is this TCP host the right one?
	// Admit refuses when sealed, waits while frozen, and keeps the idle clock.
	Admit func(stream *Stream, method string) (leave func(), err error)

	mutex    sync.Mutex
	sessions map[*Session]struct{}
}

// Session is one host's presence on one carrier.
type Session struct {
	server *Server
	out    *writer
	tag    uint32
	hangUp func() // of a carrier that ends with its session

	mutex     sync.Mutex
	streams   map[uint32]*Stream
	last      uint32
	partial   []byte // of a CALL that goes on in the next frame
	ended     bool
	displaced bool // ended by EndOthers: its carrier serves the next one
}

// Carrier is how a byte stream is treated. Trusted: only the host can be at its other end, so no token is asked for. Lasting:
// hosts come and go on it, so a violation means to scan for the next session; otherwise it means to hang up. Next: waits for
// another host where the end of the bytes is only that one has left; nil where it is the end of the carrier.
type Carrier struct {
	Trusted, Lasting bool
	Next             func()
}

// Serve speaks with whoever is at the other end until the source ends.
func (server *Server) Serve(source io.Reader, sink io.Writer, carrier Carrier, greeted func()) error {
	reader := frames.NewReader(source)
	// The writer outlives hosts, too: what somebody still writes for the last one must not come between frames for the next.
	out := &writer{sink: sink}
	for {
		err := server.sessionsOf(source, reader, out, carrier, greeted)
		if carrier.Next == nil || err != io.EOF && err != io.ErrUnexpectedEOF {
			return err
		}
		carrier.Next()
	}
}

// sessionsOf serves one session after the other until the source ends.
func (server *Server) sessionsOf(source io.Reader, reader *frames.Reader, out *writer, carrier Carrier, greeted func()) error {
	scan := true
	for {
		if scan {
			if err := reader.Scan(); err != nil {
				return err
			}
		}
		hello, err := reader.ReadHello()
		if errors.Is(err, frames.ErrViolation) {
			scan = true
			continue
		}
		if err != nil {
			return err
		}
		session := &Session{server: server, out: out, tag: hello.Tag, hangUp: func() {}, streams: map[uint32]*Stream{}}
		if closer, ok := source.(io.Closer); ok && !carrier.Lasting {
			session.hangUp = func() { _ = closer.Close() }
		}
		if fault := server.refuse(hello, carrier.Trusted); fault != nil {
			_ = out.send(session, true, session.opening(frames.Error, fault))
			if !carrier.Lasting {
				return fault
			}
			scan = true
			continue
		}
		greeted()
		server.add(session)
		err = out.send(session, true, session.opening(frames.HelloOK, server.Welcome(hello.Nonce)))
		if err == nil {
			err = session.read(reader)
		}
		session.abort()
		server.remove(session)
		switch {
		case errors.Is(err, frames.ErrNewSession):
			scan = false
		case carrier.Lasting && (errors.Is(err, frames.ErrViolation) || errors.Is(err, ErrAborted)):
			scan = true
		default:
			return err
		}
	}
}

func (server *Server) refuse(hello frames.HelloBody, trusted bool) error {
	if hello.Version != frames.Version {
		return faults.New("version", "this guest speaks version %d", frames.Version)
	}
	if !trusted && !server.Token(hello.Token) {
		return faults.New("token", "the token is not this sandbox's")
	}
	return nil
}

func (server *Server) add(session *Session) {
	server.mutex.Lock()
	defer server.mutex.Unlock()
	if server.sessions == nil {
		server.sessions = map[*Session]struct{}{}
	}
	server.sessions[session] = struct{}{}
}

func (server *Server) remove(session *Session) {
	server.mutex.Lock()
	defer server.mutex.Unlock()
	delete(server.sessions, session)
}

// Broadcast sends an event to every session. It may wait for slow hosts, so call it from a goroutine that may.
func (server *Server) Broadcast(event any) {
	payload, err := json.Marshal(event)
	if err != nil {
		return
	}
	server.mutex.Lock()
	sessions := make([]*Session, 0, len(server.sessions))
	for session := range server.sessions {
		sessions = append(sessions, session)
	}
	server.mutex.Unlock()
	for _, session := range sessions {
		_ = session.out.send(session, true, frames.Encode(frames.Frame{Kind: frames.Event, Payload: payload}, session.tag))
	}
}

// EndOthers ends every session but the one of this stream. They were opened with the machine that this one is a copy of,
// and what they asked for is that one's business.
func (server *Server) EndOthers(stream *Stream) {
	server.mutex.Lock()
	defer server.mutex.Unlock()
	for session := range server.sessions {
		if session != stream.session {
			session.mutex.Lock()
			session.displaced = true
			session.mutex.Unlock()
			session.abort()
			session.hangUp()
		}
	}
}

func (session *Session) opening(kind frames.Kind, body any) []byte {
	payload, _ := json.Marshal(body)
	return append(bytes.Clone(frames.Magic), frames.Encode(frames.Frame{Kind: kind, Payload: payload}, session.tag)...)
}

// read delivers frames until the session ends. It never writes: a host that does not read must still be heard, or
// its RESET and its next HELLO would never arrive.
func (session *Session) read(reader *frames.Reader) error {
	for {
		frame, err := reader.Next(session.tag)
		if err != nil {
			return err
		}
		if ended, displaced := session.over(); displaced {
			return frames.ErrViolation // A latecomer; the next session may follow.
		} else if ended {
			return ErrAborted // It could not be written to, so it has left; who came since is heard next.
		}
		if frame.Kind == frames.Call {
			session.partial = append(session.partial, frame.Payload...)
			if len(session.partial) > frames.MaxCall {
				return frames.ErrViolation
			}
			if frame.Flags&frames.FlagMore != 0 {
				continue
			}
			frame.Payload, session.partial = session.partial, nil
			if !session.open(frame) {
				return frames.ErrViolation
			}
			continue
		}
		stream, known := session.find(frame.Stream)
		if !known {
			return frames.ErrViolation
		}
		if stream != nil && !session.deliver(stream, frame) {
			return frames.ErrViolation
		}
	}
}

func (session *Session) deliver(stream *Stream, frame frames.Frame) bool {
	switch frame.Kind {
	case frames.Data:
		return stream.accept(frame.Payload)
	case frames.Credit:
		return len(frame.Payload) == 4 && stream.addCredit(int(binary.BigEndian.Uint32(frame.Payload)))
	case frames.End:
		stream.endOfInput()
		return true
	case frames.Reset:
		stream.abort()
		return true
	}
	return false
}

type callBody struct {
	Method string          `json:"method"`
	Params json.RawMessage `json:"params"`
}

func (session *Session) open(frame frames.Frame) bool {
	session.mutex.Lock()
	if frame.Stream <= session.last {
		session.mutex.Unlock()
		return false
	}
	session.last = frame.Stream
	stream := newStream(session, frame.Stream, frame.Flags&frames.FlagLast != 0)
	full := len(session.streams) >= maxStreams
	session.streams[stream.ID] = stream
	session.mutex.Unlock()
	if full {
		go stream.fail(faults.New("too_many", "%d streams are open", maxStreams))
	} else {
		go session.answer(stream, frame.Payload)
	}
	return true
}

func (session *Session) answer(stream *Stream, payload []byte) {
	defer func() {
		// A bug in one method must not end PID 1, and with it the sandbox.
		if trouble := recover(); trouble != nil {
			stream.fail(faults.New("internal", "%v\n%s", trouble, debug.Stack()))
		}
	}()
	var call callBody
	if err := frames.Unmarshal(payload, &call); err != nil {
		stream.fail(faults.Invalid("call: %v", err))
		return
	}
	method, known := session.server.Methods[call.Method]
	if !known {
		stream.fail(faults.New("unknown_method", "%.80q", call.Method))
		return
	}
	leave, err := session.server.Admit(stream, call.Method)
	if err != nil {
		stream.fail(err)
		return
	}
	defer leave()
	if len(call.Params) == 0 {
		call.Params = []byte("{}")
	}
	if err := method(stream, call.Params); err != nil {
		stream.fail(err)
		return
	}
	stream.fail(faults.New("internal", "the method did not answer")) // Without effect if it did.
}

// find tells an open stream from one that has been closed (nil, true) and one that never was (nil, false).
func (session *Session) find(id uint32) (*Stream, bool) {
	session.mutex.Lock()
	defer session.mutex.Unlock()
	stream := session.streams[id]
	return stream, stream != nil || id > 0 && id <= session.last
}

func (session *Session) forget(stream *Stream) {
	session.mutex.Lock()
	defer session.mutex.Unlock()
	delete(session.streams, stream.ID)
}

func (session *Session) over() (ended, displaced bool) {
	session.mutex.Lock()
	defer session.mutex.Unlock()
	return session.ended, session.displaced
}

func (session *Session) abort() {
	session.mutex.Lock()
	session.ended = true
	streams := make([]*Stream, 0, len(session.streams))
	for _, stream := range session.streams {
		streams = append(streams, stream)
	}
	session.mutex.Unlock()
	for _, stream := range streams {
		stream.abort()
	}
}
