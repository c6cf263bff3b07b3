package session

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"pandastack/guest/internal/frames"
)

func opening(tag uint32) []byte {
	payload := []byte(fmt.Sprintf(`{"version":1,"tag":%d,"nonce":"%032d"}`, tag, tag))
	return append(bytes.Clone(frames.Magic), frames.Encode(frames.Frame{Kind: frames.Hello, Payload: payload}, tag)...)
}

func call(tag uint32) []byte {
	return frames.Encode(frames.Frame{Kind: frames.Call, Flags: frames.FlagLast, Stream: 1, Payload: []byte(`{"method":"echo"}`)}, tag)
}

// answers are the frames of the sessions with these tags in what a carrier was sent, as a host would find them.
func answers(t *testing.T, sent []byte, tag uint32) (kinds []frames.Kind) {
	t.Helper()
	for at := 0; at < len(sent); {
		next := bytes.Index(sent[at:], frames.Magic)
		if next < 0 {
			return kinds
		}
		at += next + len(frames.Magic)
		reader := frames.NewReader(bytes.NewReader(sent[at:]))
		for {
			frame, err := reader.Next(tag)
			if err != nil {
				break
			}
			kinds = append(kinds, frame.Kind)
		}
	}
	return kinds
}

func newServer(called chan<- uint32) *Server {
	return &Server{
		Methods: map[string]Method{"echo": func(stream *Stream, _ []byte) error {
			err := stream.Answer("hello")
			called <- stream.session.tag
			return err
		}},
		Welcome: func(nonce string) any { return json.RawMessage(`{}`) },
		Token:   func(string) bool { return false },
		Admit:   func(*Stream, string) (func(), error) { return func() {}, nil },
	}
}

// port is a carrier without sessions: its bytes end when a host leaves, and go on when the next one comes.
type port struct {
	hosts  [][]byte
	called <-chan uint32
	wait   int // for this many calls, before a host leaves
	sent   bytes.Buffer
}

func (p *port) Read(into []byte) (int, error) {
	if len(p.hosts[0]) == 0 {
		for ; p.wait > 0; p.wait-- {
			<-p.called
		}
		return 0, io.EOF
	}
	count := copy(into, p.hosts[0])
	p.hosts[0] = p.hosts[0][count:]
	return count, nil
}

func (p *port) Write(from []byte) (int, error) { return p.sent.Write(from) }

func TestAPortServesOneHostAfterTheOther(t *testing.T) {
	half := call(7)[:20]
	padding := make([]byte, 262160)
	for name, second := range map[string][]byte{
		"at once": bytes.Join([][]byte{opening(7), half, padding, opening(8), call(8)}, nil), // Nobody noticed that the first one left.
		"later":   bytes.Join([][]byte{padding, opening(8), call(8)}, nil),
	} {
		called := make(chan uint32, 4)
		server := newServer(called)
		carrier := &port{called: called}
		if name == "later" {
			carrier.hosts = [][]byte{append(opening(7), half...)}
			if err := server.Serve(carrier, carrier, Carrier{Trusted: true, Lasting: true}, func() {}); !errors.Is(err, io.ErrUnexpectedEOF) {
				t.Fatal(name, err)
			}
		}
		carrier.hosts, carrier.wait = [][]byte{second}, 1
		if err := server.Serve(carrier, carrier, Carrier{Trusted: true, Lasting: true}, func() {}); err != io.EOF {
			t.Fatal(name, err)
		}
		if found := answers(t, carrier.sent.Bytes(), 8); len(found) != 2 || found[0] != frames.HelloOK || found[1] != frames.Reply {
			t.Fatal(name, found)
		}
		if found := answers(t, carrier.sent.Bytes(), 7); len(found) != 1 {
			t.Fatal(name, "the half call was answered", found)
		}
		if len(server.sessions) != 0 {
			t.Fatal(name, "a session is left")
		}
	}
}

// lossy is a port of which one write finds nobody at the other end.
type lossy struct {
	port
	writes, lost int
}

func (l *lossy) Read(into []byte) (int, error) {
	if len(l.hosts[0]) == 0 && len(l.hosts) > 1 {
		<-l.called
		l.hosts = l.hosts[1:]
	}
	return l.port.Read(into)
}

func (l *lossy) Write(from []byte) (int, error) {
	if l.writes++; l.writes == l.lost {
		return 0, syscall.EPIPE
	}
	return l.port.Write(from)
}

func TestAHostThatLeavesBeforeItsAnswerIsNoTroubleForTheNext(t *testing.T) {
	next := append(opening(8), call(8)...)
	late := frames.Encode(frames.Frame{Kind: frames.Call, Flags: frames.FlagLast, Stream: 2, Payload: []byte(`{"method":"echo"}`)}, 7)
	for name, test := range map[string]struct {
		hosts [][]byte
		lost  int
	}{
		"greeting": {[][]byte{append(opening(7), next...)}, 1},
		"answer":   {[][]byte{append(opening(7), call(7)...), append(late, next...)}, 2},
	} {
		called := make(chan uint32, 4)
		carrier := &lossy{port: port{hosts: test.hosts, called: called, wait: 1}, lost: test.lost}
		if err := newServer(called).Serve(carrier, carrier, Carrier{Trusted: true, Lasting: true}, func() {}); err != io.EOF {
			t.Fatal(name, err)
		}
		if found := answers(t, carrier.sent.Bytes(), 8); len(found) != 2 || found[0] != frames.HelloOK || found[1] != frames.Reply {
			t.Fatal(name, found)
		}
	}
}

// slow is a carrier on which a large frame stops half way until it is let go.
type slow struct {
	port
	half, release chan struct{}
	mutex         sync.Mutex
}

func (s *slow) Read(into []byte) (int, error) {
	if len(s.hosts) == 2 && len(s.hosts[0]) == 0 {
		<-s.half // The first host leaves in the middle of the answer.
		return 0, io.EOF
	}
	return s.port.Read(into)
}

func (s *slow) put(from []byte) {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	s.sent.Write(from)
}

func (s *slow) Write(from []byte) (int, error) {
	if len(from) > 100_000 {
		s.put(from[:50_000])
		close(s.half)
		<-s.release
		from = from[50_000:]
	}
	s.put(from)
	return len(from), nil
}

func TestAFrameForTheLastHostIsFinishedBeforeTheNextOneIsGreeted(t *testing.T) {
	called := make(chan uint32, 4)
	server := newServer(called)
	server.Methods["large"] = func(stream *Stream, _ []byte) error { return stream.Answer(strings.Repeat("x", 200_000)) }
	large := frames.Encode(frames.Frame{Kind: frames.Call, Flags: frames.FlagLast, Stream: 1, Payload: []byte(`{"method":"large"}`)}, 7)
	carrier := &slow{port: port{hosts: [][]byte{append(opening(7), large...), append(opening(8), call(8)...)}, called: called},
		half: make(chan struct{}), release: make(chan struct{})}
	left := 0
	next := func() {
		if left++; left == 1 {
			carrier.hosts, carrier.wait = carrier.hosts[1:], 1
			time.AfterFunc(50*time.Millisecond, func() { close(carrier.release) })
			return
		}
		runtime.Goexit()
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = server.Serve(carrier, carrier, Carrier{Trusted: true, Lasting: true, Next: next}, func() {})
	}()
	<-done
	carrier.mutex.Lock()
	defer carrier.mutex.Unlock()
	if found := answers(t, carrier.sent.Bytes(), 7); len(found) != 2 {
		t.Fatal("the old frame was cut in two:", found)
	}
	if found := answers(t, carrier.sent.Bytes(), 8); len(found) != 2 || found[0] != frames.HelloOK || found[1] != frames.Reply {
		t.Fatal(found)
	}
}

func TestWhoMustShowATokenAndWhoIsHungUpOn(t *testing.T) {
	for _, row := range []struct {
		carrier Carrier
		served  bool
	}{{Carrier{}, false}, {Carrier{Trusted: true}, true}, {Carrier{Trusted: true, Lasting: true}, true}} {
		called := make(chan uint32, 1)
		carrier := &port{hosts: [][]byte{append(opening(7), call(7)...)}, called: called}
		if row.served {
			carrier.wait = 1
		}
		err := newServer(called).Serve(carrier, carrier, row.carrier, func() {})
		if found := answers(t, carrier.sent.Bytes(), 7); (len(found) == 2) != row.served || (err == io.EOF) != row.served {
			t.Fatal(row, found, err)
		}
	}
	// A violation ends a connection, and nothing of it is read further; a lasting carrier scans on.
	for _, lasting := range []bool{false, true} {
		bytesOf := bytes.Join([][]byte{opening(7), call(99), opening(8)}, nil)
		carrier := &port{hosts: [][]byte{bytesOf}}
		err := newServer(nil).Serve(carrier, carrier, Carrier{Trusted: true, Lasting: lasting}, func() {})
		if found := answers(t, carrier.sent.Bytes(), 8); (len(found) == 1) != lasting || errors.Is(err, frames.ErrViolation) == lasting {
			t.Fatal(lasting, found, err)
		}
	}
}
