// Package frames reads and writes the frames of PROTOCOL.md, section 2. It knows nothing of streams or methods.
package frames

import (
	"bufio"
	"bytes"
	"cmp"
	"encoding/binary"
	"encoding/json"
	"errors"
	"io"
	"sync"
)

const (
	Version     = 1
	HeaderSize  = 12
	TrailerSize = 4
	MaxPayload  = 262144
	MaxHello    = 4096
	Window      = 1 << 20

	MaxCall = 4 << 20

	FlagLast = 1 // On CALL: no DATA follows. On REPLY: no END follows.
	FlagMore = 2 // On CALL: the JSON goes on in the next frame, which is a CALL of the same stream.
)

// Magic starts a session. Its first byte is no kind, so it cannot be taken for a header.
var Magic = []byte("\xf0PANDASTACK\r\n\x1a\x01\xf1")

type Kind uint8

const (
	Hello Kind = iota + 1
	HelloOK
	Call
	Reply
	Error
	Data
	Credit
	End
	Reset
	Event
)

type Frame struct {
	Kind    Kind
	Flags   uint8
	Stream  uint32
	Payload []byte
}

// HelloBody is what the host introduces itself with.
type HelloBody struct {
	Version int    `json:"version"`
	Tag     uint32 `json:"tag"`
	Nonce   string `json:"nonce"`
	Token   string `json:"token"`
}

// ErrViolation means that the peer broke the framing: the session is over, the byte stream may still carry another.
var ErrViolation = errors.New("frame violates the protocol")

// ErrNewSession means that the magic stood where a header was due; the magic has been consumed.
var ErrNewSession = errors.New("a new session begins")

// Put writes header and trailer around a payload that already lies in buffer[HeaderSize : HeaderSize+length], and
// returns the whole frame. Callers read straight into the middle of a buffer, so nothing is copied.
func Put(buffer []byte, kind Kind, flags uint8, stream uint32, length int, tag uint32) []byte {
	buffer = buffer[:HeaderSize+length+TrailerSize]
	buffer[0], buffer[1], buffer[2], buffer[3] = byte(kind), flags, 0, 0
	binary.BigEndian.PutUint32(buffer[4:], stream)
	binary.BigEndian.PutUint32(buffer[8:], uint32(length))
	binary.BigEndian.PutUint32(buffer[HeaderSize+length:], tag)
	return buffer
}

// Encode returns a frame with a copy of the payload.
func Encode(frame Frame, tag uint32) []byte {
	buffer := make([]byte, HeaderSize+len(frame.Payload)+TrailerSize)
	copy(buffer[HeaderSize:], frame.Payload)
	return Put(buffer, frame.Kind, frame.Flags, frame.Stream, len(frame.Payload), tag)
}

// A bulk upload would otherwise make garbage as fast as it comes, and spend most of its time collecting it.
const pooledSize = MaxPayload + TrailerSize

var pool = sync.Pool{New: func() any { return make([]byte, pooledSize) }}

func take(length int) []byte {
	if length <= pooledSize/8 {
		return make([]byte, length)
	}
	return pool.Get().([]byte)[:length]
}

// Recycle gives back a payload that nobody refers to any more. Doing so is optional.
func Recycle(payload []byte) {
	if cap(payload) == pooledSize {
		pool.Put(payload[:pooledSize])
	}
}

// Reader cuts a byte stream into frames. It is used by one goroutine.
type Reader struct {
	source *bufio.Reader
	header [HeaderSize]byte
}

func NewReader(source io.Reader) *Reader {
	return &Reader{source: bufio.NewReaderSize(source, 64<<10)}
}

// Next returns the next frame of the session with this tag. Its payload is the caller's to keep.
// Errors: ErrNewSession, ErrViolation, or what the source said.
func (r *Reader) Next(tag uint32) (Frame, error) {
	first, err := r.source.Peek(1)
	if err != nil {
		return Frame{}, err
	}
	if first[0] == Magic[0] {
		start, err := r.source.Peek(len(Magic))
		if err != nil {
			return Frame{}, err
		}
		if !bytes.Equal(start, Magic) {
			return Frame{}, ErrViolation
		}
		_, _ = r.source.Discard(len(Magic))
		return Frame{}, ErrNewSession
	}
	return r.read(tag, MaxPayload)
}

func (r *Reader) read(tag uint32, limit uint32) (Frame, error) {
	// A magic directly behind a magic is left for Scan: the first of the two hosts died at once.
	if first, err := r.source.Peek(1); err != nil || first[0] == Magic[0] {
		return Frame{}, cmp.Or(err, ErrViolation)
	}
	if _, err := io.ReadFull(r.source, r.header[:]); err != nil {
		return Frame{}, err
	}
	frame := Frame{Kind: Kind(r.header[0]), Flags: r.header[1], Stream: binary.BigEndian.Uint32(r.header[4:])}
	length := binary.BigEndian.Uint32(r.header[8:])
	if frame.Kind < Hello || frame.Kind > Event || r.header[2] != 0 || r.header[3] != 0 || length > limit {
		return Frame{}, ErrViolation
	}
	body := take(int(length) + TrailerSize)
	if _, err := io.ReadFull(r.source, body); err != nil {
		return Frame{}, err
	}
	got := binary.BigEndian.Uint32(body[length:])
	if tag != 0 && got != tag || got == 0 {
		return Frame{}, ErrViolation
	}
	frame.Payload = body[:length]
	if tag == 0 {
		// Only a HELLO comes without a known tag; it names its own, which the caller compares.
		frame.Payload = body
	}
	return frame, nil
}

// Scan discards bytes up to and including the next magic.
func (r *Reader) Scan() error {
	matched := 0
	for {
		// Padding is many equal bytes: look for the first byte of the magic in all that is buffered.
		if matched == 0 {
			if _, err := r.source.Peek(1); err != nil {
				return err
			}
			buffered, _ := r.source.Peek(r.source.Buffered())
			at := bytes.IndexByte(buffered, Magic[0])
			if at < 0 {
				at = len(buffered)
			}
			_, _ = r.source.Discard(at)
			if at == len(buffered) {
				continue
			}
		}
		b, err := r.source.ReadByte()
		if err != nil {
			return err
		}
		switch {
		case b == Magic[matched]:
			matched++
			if matched == len(Magic) {
				return nil
			}
		case b == Magic[0]: // The first byte occurs once in the magic, so a failed match can only restart here.
			matched = 1
		default:
			matched = 0
		}
	}
}

// ReadHello reads the frame after a magic. ErrViolation means: not a HELLO, scan on.
func (r *Reader) ReadHello() (HelloBody, error) {
	var hello HelloBody
	frame, err := r.read(0, MaxHello)
	if err != nil {
		return hello, err
	}
	length := len(frame.Payload) - TrailerSize
	if frame.Kind != Hello || frame.Stream != 0 || Unmarshal(frame.Payload[:length], &hello) != nil {
		return hello, ErrViolation
	}
	if hello.Tag != binary.BigEndian.Uint32(frame.Payload[length:]) {
		return hello, ErrViolation
	}
	return hello, nil
}

// Unmarshal decodes exactly one JSON value and refuses fields the target does not have.
func Unmarshal(payload []byte, into any) error {
	decoder := json.NewDecoder(bytes.NewReader(payload))
	decoder.DisallowUnknownFields()
	if err := decoder.Decode(into); err != nil {
		return err
	}
	if _, err := decoder.Token(); err != io.EOF {
		return errors.New("more than one JSON value")
	}
	return nil
}
