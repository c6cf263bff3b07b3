package files

import (
	"bytes"
	"errors"
	"os"
	"path"
	"strings"
	"syscall"
	"unsafe"

	"pandastack/guest/internal/faults"
	"pandastack/guest/internal/session"
)

const (
	maxWatches  = 8192
	watchBuffer = 16 << 10
	watched     = syscall.IN_CREATE | syscall.IN_MODIFY | syscall.IN_CLOSE_WRITE | syscall.IN_ATTRIB | syscall.IN_DELETE |
		syscall.IN_MOVED_FROM | syscall.IN_MOVED_TO | syscall.IN_DELETE_SELF | syscall.IN_MOVE_SELF
)

type watchEvent struct {
	Type      string `json:"type"`
	Path      string `json:"path"`
	PathB64   string `json:"path_b64,omitempty"`
	Directory bool   `json:"directory"`
}

type watchBatch struct {
	Events   []watchEvent `json:"events"`
	Overflow bool         `json:"overflow"`
}

// watcher is one inotify instance for one call.
type watcher struct {
	file      *os.File
	root      string
	recursive bool
	paths     map[int32]string
	gone      bool // the root was deleted or moved away
}

func callWatch(stream *session.Stream, raw []byte) error {
	wanted, err := params[struct {
		where
		Recursive bool `json:"recursive"`
	}](raw)
	if err != nil {
		return err
	}
	full, err := wanted.resolve()
	if err != nil {
		return err
	}
	descriptor, err := syscall.InotifyInit1(syscall.IN_CLOEXEC | syscall.IN_NONBLOCK)
	if err != nil {
		return err
	}
	watcher := &watcher{file: os.NewFile(uintptr(descriptor), "inotify"), root: path.Clean(full),
		recursive: wanted.Recursive, paths: map[int32]string{}}
	defer watcher.file.Close()
	if err := watcher.add(watcher.root, nil); err != nil {
		return err
	}
	if err := stream.Reply(struct{}{}); err != nil {
		return err
	}
	finished := make(chan struct{})
	defer close(finished)
	go func() {
		// The host says that it has seen enough by END; a RESET or a lost session aborts. Both end the read below.
		for {
			if _, err := stream.Receive(); err != nil {
				_ = watcher.file.Close()
				return
			}
			select {
			case <-finished:
				return
			default:
			}
		}
	}()
	if err := watcher.follow(stream); err != nil && !errors.Is(err, os.ErrClosed) {
		return err
	}
	select {
	case <-stream.Done():
		return session.ErrAborted
	default:
		return stream.End(nil)
	}
}

func (w *watcher) follow(stream *session.Stream) error {
	buffer := make([]byte, watchBuffer)
	for !w.gone {
		count, err := w.file.Read(buffer)
		if err != nil {
			return err
		}
		batch := w.decode(buffer[:count])
		if len(batch.Events) > 0 || batch.Overflow {
			if err := stream.SendJSON(batch); err != nil {
				return err
			}
		}
	}
	return nil
}

// control uses the descriptor while it is certainly open: another goroutine closes it when the host has seen enough.
func (w *watcher) control(use func(fd int) error) error {
	connection, err := w.file.SyscallConn()
	if err != nil {
		return err
	}
	var result error
	if err := connection.Control(func(fd uintptr) { result = use(int(fd)) }); err != nil {
		return err
	}
	return result
}

// add watches a path and, when recursive, the directories below. What is found there came into being unseen: `found`
// gets it, so that a tree that is created at once is reported completely.
func (w *watcher) add(full string, found *watchBatch) error {
	if len(w.paths) >= maxWatches {
		if found == nil {
			return faults.New("too_large", "more than %d directories", maxWatches)
		}
		found.Overflow = true
		return nil
	}
	var descriptor int
	err := w.control(func(fd int) (err error) {
		descriptor, err = syscall.InotifyAddWatch(fd, full, watched)
		return err
	})
	if err != nil {
		return named(full, err)
	}
	w.paths[int32(descriptor)] = full
	if !w.recursive {
		return nil
	}
	entries, _ := os.ReadDir(full)
	for _, entry := range entries {
		child := strings.TrimSuffix(full, "/") + "/" + entry.Name()
		if found != nil {
			found.add("create", child, entry.IsDir())
		}
		if entry.IsDir() {
			if err := w.add(child, found); err != nil && found == nil {
				var errno syscall.Errno
				if !errors.As(err, &errno) || errno != syscall.ENOENT {
					return err
				}
			}
		}
	}
	return nil
}

func (b *watchBatch) add(kind, full string, directory bool) {
	if len(b.Events) >= 1000 {
		b.Overflow = true
		return
	}
	event := watchEvent{Type: kind, Directory: directory}
	event.Path, event.PathB64 = spell(full)
	// A program that writes in small pieces makes many equal events in a row.
	if last := len(b.Events) - 1; last < 0 || b.Events[last] != event {
		b.Events = append(b.Events, event)
	}
}

func (w *watcher) decode(buffer []byte) watchBatch {
	batch := watchBatch{Events: []watchEvent{}}
	for len(buffer) >= syscall.SizeofInotifyEvent {
		raw := (*syscall.InotifyEvent)(unsafe.Pointer(&buffer[0]))
		mask, descriptor := raw.Mask, raw.Wd
		name := buffer[syscall.SizeofInotifyEvent : syscall.SizeofInotifyEvent+raw.Len]
		buffer = buffer[syscall.SizeofInotifyEvent+raw.Len:]
		if mask&syscall.IN_Q_OVERFLOW != 0 {
			batch.Overflow = true
			continue
		}
		full, known := w.paths[descriptor]
		if !known {
			continue
		}
		own := full == w.root
		if mask&syscall.IN_IGNORED != 0 {
			delete(w.paths, descriptor)
			w.gone = w.gone || own
			continue
		}
		if mask&(syscall.IN_DELETE_SELF|syscall.IN_MOVE_SELF) != 0 {
			w.leave(mask, own, descriptor, &batch)
			continue
		}
		if text, _, _ := bytes.Cut(name, []byte{0}); len(text) > 0 {
			if bytes.HasPrefix(text, []byte(temporaryPrefix)) {
				continue // An upload of ours on its way; its rename is reported under the real name.
			}
			full = strings.TrimSuffix(full, "/") + "/" + string(text)
		}
		w.translate(mask, full, &batch)
	}
	return batch
}

// leave handles the end of a watched path itself. Below the root its parent reports it, so only the root does here.
func (w *watcher) leave(mask uint32, own bool, descriptor int32, batch *watchBatch) {
	if own {
		kind := "delete"
		if mask&syscall.IN_MOVE_SELF != 0 {
			kind = "move_from"
		}
		batch.add(kind, w.root, mask&syscall.IN_ISDIR != 0)
		w.gone = true
	} else if _, err := os.Lstat(w.paths[descriptor]); err != nil {
		// Moved out of the tree, so its paths would be wrong. Moved within, `translate` has given it its new one.
		_ = w.control(func(fd int) error {
			_, err := syscall.InotifyRmWatch(fd, uint32(descriptor))
			return err
		})
		delete(w.paths, descriptor)
	}
}

func (w *watcher) translate(mask uint32, full string, batch *watchBatch) {
	directory := mask&syscall.IN_ISDIR != 0
	arrived := mask&(syscall.IN_CREATE|syscall.IN_MOVED_TO) != 0
	for _, kind := range []struct {
		bits uint32
		name string
	}{
		{syscall.IN_CREATE, "create"},
		{syscall.IN_MODIFY | syscall.IN_CLOSE_WRITE, "modify"},
		{syscall.IN_ATTRIB, "attributes"},
		{syscall.IN_DELETE, "delete"},
		{syscall.IN_MOVED_FROM, "move_from"},
		{syscall.IN_MOVED_TO, "move_to"},
	} {
		if mask&kind.bits != 0 {
			batch.add(kind.name, full, directory)
		}
	}
	if arrived && directory && w.recursive {
		_ = w.add(full, batch)
	}
}
