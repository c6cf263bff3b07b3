package frames

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"testing"
	"testing/iotest"
)

const tag = 0x01020304

func hello() []byte {
	body, _ := json.Marshal(HelloBody{Version: 1, Tag: tag, Nonce: "00"})
	return append(bytes.Clone(Magic), Encode(Frame{Kind: Hello, Payload: body}, tag)...)
}

func TestFrameSurvivesByteWiseDelivery(t *testing.T) {
	sent := Frame{Kind: Data, Flags: 2, Stream: 7, Payload: []byte("hello\xf0")}
	reader := NewReader(iotest.OneByteReader(bytes.NewReader(Encode(sent, tag))))
	got, err := reader.Next(tag)
	if err != nil || got.Kind != sent.Kind || got.Flags != 2 || got.Stream != 7 || !bytes.Equal(got.Payload, sent.Payload) {
		t.Fatal(got, err)
	}
}

func TestWrongTagIsNotDelivered(t *testing.T) {
	for _, wrong := range []uint32{0, tag + 1} {
		if _, err := NewReader(bytes.NewReader(Encode(Frame{Kind: Data}, wrong))).Next(tag); !errors.Is(err, ErrViolation) {
			t.Fatal(err)
		}
	}
}

// However much of a dying session's frame arrived, padding and HELLO start the next one.
func TestPaddingCompletesAnyHalfFrame(t *testing.T) {
	whole := Encode(Frame{Kind: Data, Stream: 1, Payload: bytes.Repeat([]byte{0xf0}, MaxPayload)}, tag)
	for _, cut := range []int{0, 1, 4, 9, 10, 11, 12, 13, 5000, len(whole) - 4, len(whole) - 1} {
		stream := append(bytes.Clone(whole[:cut]), make([]byte, MaxPayload+16)...)
		reader := NewReader(bytes.NewReader(append(stream, hello()...)))
		frame, err := reader.Next(tag)
		if !errors.Is(err, ErrViolation) {
			t.Fatal("cut", cut, "delivered", frame.Kind, err)
		}
		if err := reader.Scan(); err != nil {
			t.Fatal("cut", cut, err)
		}
		if got, err := reader.ReadHello(); err != nil || got.Tag != tag {
			t.Fatal("cut", cut, got, err)
		}
	}
}

func TestMagicAtABoundaryIsANewSession(t *testing.T) {
	reader := NewReader(bytes.NewReader(append(Encode(Frame{Kind: Credit}, tag), hello()...)))
	if _, err := reader.Next(tag); err != nil {
		t.Fatal(err)
	}
	if _, err := reader.Next(tag); !errors.Is(err, ErrNewSession) {
		t.Fatal(err)
	}
	if _, err := reader.ReadHello(); err != nil {
		t.Fatal(err)
	}
}

func TestUnknownFieldsAreRefused(t *testing.T) {
	var into struct{ A int }
	for _, text := range []string{`{"b":1}`, `{"A":1} {}`, `{`} {
		if Unmarshal([]byte(text), &into) == nil {
			t.Fatal(text)
		}
	}
}

func FuzzReader(f *testing.F) {
	f.Add(hello())
	f.Add(Encode(Frame{Kind: Data, Flags: 1, Stream: 3, Payload: []byte("x")}, tag))
	f.Add(append(make([]byte, 40), hello()...))
	f.Fuzz(func(t *testing.T, input []byte) {
		reader := NewReader(bytes.NewReader(input))
		for {
			frame, err := reader.Next(tag)
			switch {
			case err == nil:
				if len(frame.Payload) > MaxPayload || !bytes.Contains(input, Encode(frame, tag)) {
					t.Fatal("delivered what was not sent")
				}
			case errors.Is(err, ErrNewSession):
				_, _ = reader.ReadHello()
			case errors.Is(err, ErrViolation):
				if reader.Scan() != nil {
					return
				}
				_, _ = reader.ReadHello()
			case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
				return
			default:
				t.Fatal(err)
			}
		}
	})
}
