package carriers

import (
	"bytes"
	"encoding/binary"
	"io"
	"net"
	"testing"
	"time"
)

// dial makes a connection as the host does, and lets the links take its other end.
func dial(t *testing.T, links *Links, operation byte, id byte, sent uint64) net.Conn {
	t.Helper()
	host, guest := net.Pipe()
	t.Cleanup(func() { _ = host.Close() })
	_ = host.SetDeadline(time.Now().Add(10 * time.Second))
	go links.Take(guest)
	preamble := append([]byte{operation}, bytes.Repeat([]byte{id}, linkIDBytes)...)
	if _, err := host.Write(binary.BigEndian.AppendUint64(preamble, sent)); err != nil {
		t.Fatal(err)
	}
	return host
}

func read(t *testing.T, from io.Reader, count int) string {
	t.Helper()
	into := make([]byte, count)
	if _, err := io.ReadFull(from, into); err != nil {
		t.Fatal(err)
	}
	return string(into)
}

func held(t *testing.T, links *Links, id byte, sent uint64) uint64 {
	t.Helper()
	return binary.BigEndian.Uint64([]byte(read(t, dial(t, links, linkHold, id, sent), 8)))
}

func TestALinkGoesOnOverAnotherConnection(t *testing.T) {
	links := NewLinks()
	host := dial(t, links, linkOpen, 1, 0)
	link := links.Next()
	go func() { _, _ = link.Write([]byte("hello")) }()
	if said := read(t, host, 5); said != "hello" {
		t.Fatal(said)
	}
	go func() { _, _ = host.Write([]byte("ab")) }()
	if said := read(t, link, 2); said != "ab" {
		t.Fatal(said)
	}
	if sent := held(t, links, 1, 2); sent != 5 {
		t.Fatal(sent)
	}
	answered := make(chan string)
	go func() {
		_, _ = link.Write([]byte("after"))
		answered <- read(t, link, 3)
	}()
	_ = host.Close()
	again := dial(t, links, linkResume, 1, 0)
	if said := read(t, again, 6); said != "\x01after" {
		t.Fatalf("%q", said)
	}
	go func() { _, _ = again.Write([]byte("end")) }()
	if said := <-answered; said != "end" {
		t.Fatal(said)
	}
	_ = again.Close()
	if _, err := link.Read(make([]byte, 1)); err != io.EOF {
		t.Fatal("the host has gone", err)
	}
}

func TestAHoldWaitsForWhatIsUnderWay(t *testing.T) {
	links := NewLinks()
	host := dial(t, links, linkOpen, 1, 0)
	link := links.Next()
	control := dial(t, links, linkHold, 1, 3)
	_ = control.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
	if _, err := control.Read(make([]byte, 1)); err == nil {
		t.Fatal("it did not wait")
	}
	_ = control.SetReadDeadline(time.Now().Add(10 * time.Second))
	go func() { _, _ = host.Write([]byte("abc")) }()
	read(t, link, 3)
	if answer := read(t, control, 8); answer != string(make([]byte, 8)) {
		t.Fatalf("%q", answer)
	}
}

func TestANewHostEndsALinkThatIsHeld(t *testing.T) {
	links := NewLinks()
	_ = dial(t, links, linkOpen, 1, 0)
	link := links.Next()
	held(t, links, 1, 0)
	ended := make(chan error)
	go func() {
		_, err := link.Read(make([]byte, 1))
		ended <- err
	}()
	_ = dial(t, links, linkOpen, 2, 0)
	links.Next()
	if err := <-ended; err != io.EOF {
		t.Fatal(err)
	}
	if _, err := link.Write([]byte("x")); err == nil {
		t.Fatal("it is over")
	}
	if count, err := dial(t, links, linkResume, 1, 0).Read(make([]byte, 1)); err == nil {
		t.Fatal("it cannot go on", count)
	}
}

func TestALinkThatIsNotHeldCannotBeTaken(t *testing.T) {
	links := NewLinks()
	host := dial(t, links, linkOpen, 1, 0)
	link := links.Next()
	other := dial(t, links, linkResume, 1, 0)
	if _, err := other.Read(make([]byte, 1)); err != io.EOF {
		t.Fatal(err)
	}
	go func() { _, _ = host.Write([]byte("x")) }()
	if said := read(t, link, 1); said != "x" {
		t.Fatal(said)
	}
}
