package processes

import (
	"encoding/binary"
	"sync"
	"time"

	"pandastack/guest/internal/frames"
	"pandastack/guest/internal/session"
)

const offsetBytes = 8

var sendBuffers = sync.Pool{New: func() any {
	buffer := make([]byte, frames.HeaderSize+offsetBytes+session.Chunk+frames.TrailerSize)
	return &buffer
}}

// join adds a reader at an offset, nil meaning the oldest byte kept; the mutex is held.
func (o *output) join(wanted *int64) *reader {
	offset := o.oldest()
	if wanted != nil {
		offset = min(max(offset, *wanted), o.total)
	}
	reader := &reader{offset: offset, moved: time.Now(), holding: true}
	o.readers[reader] = struct{}{}
	return reader
}

// attachment is one stream that follows a process.
type attachment struct {
	process *Process
	readers [2]*reader
	turn    int // which output goes first next time, so that a loud one cannot starve the other
}

func (p *Process) attach(offsets [2]*int64) *attachment {
	p.mutex.Lock()
	defer p.mutex.Unlock()
	attachment := &attachment{process: p}
	for index := range p.outputs {
		attachment.readers[index] = p.outputs[index].join(offsets[index])
	}
	return attachment
}

func (a *attachment) leave() {
	a.process.mutex.Lock()
	defer a.process.mutex.Unlock()
	for index, reader := range a.readers {
		delete(a.process.outputs[index].readers, reader)
	}
	a.process.changed.Broadcast()
}

// next waits for output that was not sent. It returns -1 when the process is settled and all is sent, or aborted.
func (a *attachment) next(stream *session.Stream) int {
	process := a.process
	process.mutex.Lock()
	defer process.mutex.Unlock()
	for {
		select {
		case <-stream.Done():
			return -1
		default:
		}
		for range a.readers {
			a.turn = 1 - a.turn
			if a.readers[a.turn].offset < a.end(a.turn) {
				a.readers[a.turn].moved = time.Now() // From here on it can be said to stall.
				return a.turn
			}
		}
		if process.settled() || process.drop {
			return -1
		}
		process.changed.Wait()
	}
}

// end is how far an output is reported: after the exit no further than the exit says.
func (a *attachment) end(index int) int64 {
	if a.process.settled() {
		return []int64{a.process.exit.Stdout, a.process.exit.Stderr}[index]
	}
	return a.process.outputs[index].total
}

// follow sends output until the process is settled, then END; ErrAborted when nobody listens any more.
func (a *attachment) follow(stream *session.Stream) error {
	ended := make(chan struct{})
	defer close(ended)
	defer a.leave()
	go func() {
		select {
		case <-stream.Done():
			a.process.wake()
		case <-ended:
		}
	}()
	for {
		index := a.next(stream)
		if index < 0 {
			break
		}
		if err := a.sendOne(stream, index); err != nil {
			return err
		}
	}
	select {
	case <-stream.Done():
		return session.ErrAborted
	default:
	}
	a.process.mutex.Lock()
	exit := *a.process.exit
	a.process.mutex.Unlock()
	return stream.End(exit)
}

func (a *attachment) sendOne(stream *session.Stream, index int) error {
	granted, err := stream.Reserve(offsetBytes+1, offsetBytes+session.Chunk)
	if err != nil {
		return err
	}
	pooled := sendBuffers.Get().(*[]byte)
	defer sendBuffers.Put(pooled)
	payload := (*pooled)[frames.HeaderSize : frames.HeaderSize+granted]

	process, reader := a.process, a.readers[index]
	process.mutex.Lock()
	end := a.end(index)
	room := min(int64(granted-offsetBytes), end-reader.offset)
	offset, count, err := process.outputs[index].readAt(reader.offset, payload[offsetBytes:offsetBytes+room])
	if err == nil {
		// A grandchild may have pushed the oldest byte kept beyond what this stream reports.
		count = max(0, min(count, int(end-offset)))
		reader.offset = min(end, offset+int64(count))
		reader.moved = time.Now()
		reader.holding = true
		// Only a pump that waits for this reader cares.
		process.changed.Broadcast()
	}
	process.mutex.Unlock()
	stream.Refund(granted - offsetBytes - count)
	if err != nil || count == 0 {
		return err
	}
	binary.BigEndian.PutUint64(payload, uint64(offset))
	return stream.SendReserved(uint8(index)+1, *pooled, offsetBytes+count)
}
