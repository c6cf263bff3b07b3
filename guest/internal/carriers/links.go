package carriers

import (
	"encoding/binary"
	"io"
	"sync"
	"time"
)

// A hypervisor may cut every vsock connection when it saves a machine, also of one that goes on. So the stream to a host is a
// link, which outlives a connection: the host holds it, and goes on with it over the next one. See PROTOCOL.md, section 1.

const (
	linkOpen, linkResume, linkHold = 1, 2, 3
	linkAccepted                   = 1

	preambleBytes = 1 + linkIDBytes + 8
	linkIDBytes   = 16

	preambleTimeout = 10 * time.Second
	// How long a host waits for what is under way in the other direction, at most.
	holdTimeout = 30 * time.Second
	// In the copies of a machine nobody ever comes back for it, but for a new host, which ends it at once.
	heldTimeout = 120 * time.Second
)

// Stream is a connection with a host.
type Stream interface {
	io.ReadWriteCloser
	SetReadDeadline(until time.Time) error
}

// Links are those of one listener.
type Links struct {
	mutex sync.Mutex
	known map[[linkIDBytes]byte]*Link
	fresh chan *Link
}

// NewLinks has none yet.
func NewLinks() *Links {
	return &Links{known: map[[linkIDBytes]byte]*Link{}, fresh: make(chan *Link)}
}

// Next waits for a host that opens a link.
func (l *Links) Next() *Link { return <-l.fresh }

// Take looks at what the host wants with a connection, and does it. It waits for the host; call it from a goroutine.
func (l *Links) Take(stream Stream) {
	var preamble [preambleBytes]byte
	_ = stream.SetReadDeadline(time.Now().Add(preambleTimeout))
	if _, err := io.ReadFull(stream, preamble[:]); err != nil {
		_ = stream.Close()
		return
	}
	_ = stream.SetReadDeadline(time.Time{})
	id := [linkIDBytes]byte(preamble[1 : 1+linkIDBytes])
	switch preamble[0] {
	case linkOpen:
		l.fresh <- l.open(id, stream)
	case linkResume:
		link := l.find(id)
		if link == nil || !link.resume(stream) {
			_ = stream.Close()
		}
	case linkHold:
		if link := l.find(id); link != nil {
			if sent, ok := link.hold(binary.BigEndian.Uint64(preamble[1+linkIDBytes:])); ok {
				_, _ = stream.Write(binary.BigEndian.AppendUint64(nil, sent))
			}
		}
		_ = stream.Close()
	default:
		_ = stream.Close()
	}
}

func (l *Links) open(id [linkIDBytes]byte, stream Stream) *Link {
	link := &Link{links: l, id: id, stream: stream}
	link.changed = sync.NewCond(&link.mutex)
	l.mutex.Lock()
	// One that is held belongs to a host that is not here any more: this machine is a copy, or that host has died.
	var left []*Link
	for _, other := range l.known {
		if other.isHeld() || other.id == id {
			left = append(left, other)
		}
	}
	l.mutex.Unlock()
	for _, other := range left {
		_ = other.Close()
	}
	l.mutex.Lock()
	l.known[id] = link
	l.mutex.Unlock()
	return link
}

func (l *Links) find(id [linkIDBytes]byte) *Link {
	l.mutex.Lock()
	defer l.mutex.Unlock()
	return l.known[id]
}

func (l *Links) forget(link *Link) {
	l.mutex.Lock()
	defer l.mutex.Unlock()
	if l.known[link.id] == link {
		delete(l.known, link.id)
	}
}

// Link is the byte stream between a host and a session. While it is held, reading and writing wait.
type Link struct {
	links *Links
	id    [linkIDBytes]byte

	mutex          sync.Mutex
	changed        *sync.Cond
	stream         Stream // nil while it is held and the connection is gone
	held, closed   bool
	writing        bool
	received, sent uint64
	expiry         *time.Timer
}

// Read returns io.EOF when the host has gone, and not when it comes back.
func (k *Link) Read(into []byte) (int, error) {
	for {
		stream := k.current(func() bool { return k.stream != nil })
		if stream == nil {
			return 0, io.EOF
		}
		count, err := stream.Read(into)
		k.mutex.Lock()
		k.received += uint64(count)
		if err != nil && k.held && k.stream == stream {
			k.stream = nil
			_ = stream.Close()
		}
		again := count == 0 && err != nil && (k.held || k.stream != stream) && !k.closed
		k.changed.Broadcast()
		k.mutex.Unlock()
		if !again {
			if count > 0 {
				err = nil
			}
			return count, err
		}
	}
}

// Write writes all of it, or fails.
func (k *Link) Write(from []byte) (int, error) {
	k.mutex.Lock()
	for (k.held || k.stream == nil) && !k.closed {
		k.changed.Wait()
	}
	stream := k.stream
	if k.closed {
		k.mutex.Unlock()
		return 0, io.ErrClosedPipe
	}
	k.writing = true
	k.mutex.Unlock()
	count, err := stream.Write(from)
	k.mutex.Lock()
	defer k.mutex.Unlock()
	k.sent += uint64(count)
	k.writing = false
	k.changed.Broadcast()
	return count, err
}

// current waits until `ready`, and returns the connection; nil when the link was closed.
func (k *Link) current(ready func() bool) Stream {
	k.mutex.Lock()
	defer k.mutex.Unlock()
	for !ready() && !k.closed {
		k.changed.Wait()
	}
	if k.closed {
		return nil
	}
	return k.stream
}

// SetReadDeadline is that of the connection of this moment.
func (k *Link) SetReadDeadline(until time.Time) error {
	k.mutex.Lock()
	defer k.mutex.Unlock()
	if k.stream == nil {
		return nil
	}
	return k.stream.SetReadDeadline(until)
}

// Close ends the link, and with it the session.
func (k *Link) Close() error {
	k.mutex.Lock()
	k.closed = true
	if k.stream != nil {
		_ = k.stream.Close()
	}
	if k.expiry != nil {
		k.expiry.Stop()
	}
	k.changed.Broadcast()
	k.mutex.Unlock()
	k.links.forget(k)
	return nil
}

func (k *Link) isHeld() bool {
	k.mutex.Lock()
	defer k.mutex.Unlock()
	return k.held
}

// hold waits until nothing is under way: all that the host has sent was read, and nothing more is written. It returns how much
// this end has written in all.
func (k *Link) hold(sent uint64) (uint64, bool) {
	k.mutex.Lock()
	defer k.mutex.Unlock()
	k.held = true
	late := false
	timer := time.AfterFunc(holdTimeout, func() {
		k.mutex.Lock()
		defer k.mutex.Unlock()
		late = true
		k.changed.Broadcast()
	})
	defer timer.Stop()
	for (k.writing || k.received < sent) && !late && !k.closed {
		k.changed.Wait()
	}
	if late || k.closed || k.received != sent {
		k.held = false
		k.changed.Broadcast()
		return 0, false
	}
	if k.expiry != nil {
		k.expiry.Stop()
	}
	k.expiry = time.AfterFunc(heldTimeout, func() {
		if k.isHeld() {
			_ = k.Close()
		}
	})
	return k.sent, true
}

// resume goes on over another connection.
func (k *Link) resume(stream Stream) bool {
	k.mutex.Lock()
	defer k.mutex.Unlock()
	if k.closed || !k.held {
		return false
	}
	// Before anything that waits is written; the host reads it at once.
	if _, err := stream.Write([]byte{linkAccepted}); err != nil {
		return false
	}
	if k.expiry != nil {
		k.expiry.Stop()
	}
	if k.stream != nil {
		_ = k.stream.Close()
	}
	k.stream, k.held = stream, false
	k.changed.Broadcast()
	return true
}
