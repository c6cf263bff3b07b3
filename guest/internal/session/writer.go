package session

import (
	"io"
	"sync"
)

// gate is a lock whose waiters are served in order, those with urgent frames first. With one bulk frame per stream in
// the queue this is round robin between streams, and a small frame waits for at most one bulk frame.
type gate struct {
	mutex        sync.Mutex
	busy         bool
	urgent, bulk []chan struct{}
}

func (g *gate) lock(urgent bool) {
	g.mutex.Lock()
	if !g.busy {
		g.busy = true
		g.mutex.Unlock()
		return
	}
	turn := make(chan struct{})
	if urgent {
		g.urgent = append(g.urgent, turn)
	} else {
		g.bulk = append(g.bulk, turn)
	}
	g.mutex.Unlock()
	<-turn
}

func (g *gate) unlock() {
	g.mutex.Lock()
	defer g.mutex.Unlock()
	queue := &g.urgent
	if len(*queue) == 0 {
		queue = &g.bulk
	}
	if len(*queue) == 0 {
		g.busy = false
		return
	}
	turn := (*queue)[0]
	*queue = (*queue)[1:]
	close(turn)
}

// writer is the sending half of a carrier. It outlives sessions, so that a frame of an old session that is half
// written is finished before anything of the new one.
type writer struct {
	sink io.Writer
	gate gate
}

// send writes whole frames of a session that is still alive.
func (w *writer) send(session *Session, urgent bool, buffer []byte) error {
	w.gate.lock(urgent)
	defer w.gate.unlock()
	if ended, _ := session.over(); ended {
		return ErrAborted
	}
	if _, err := w.sink.Write(buffer); err != nil {
		// The other end is gone. Streams must not go on producing for nobody.
		session.abort()
		return ErrAborted
	}
	return nil
}
