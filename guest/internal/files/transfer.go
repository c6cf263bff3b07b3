package files

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"io"
	"os"
	"path"
	"sync"
	"syscall"

	"pandastack/guest/internal/faults"
	"pandastack/guest/internal/frames"
	"pandastack/guest/internal/processes"
	"pandastack/guest/internal/session"
)

const (
	maxLinks        = 40
	temporaryPrefix = ".pandastack-"
)

var buffers = sync.Pool{New: func() any {
	buffer := make([]byte, frames.HeaderSize+session.Chunk+frames.TrailerSize)
	return &buffer
}}

func callRead(stream *session.Stream, raw []byte) error {
	wanted, err := params[struct {
		where
		Offset int64  `json:"offset"`
		Length *int64 `json:"length"`
	}](raw)
	if err != nil {
		return err
	}
	full, err := wanted.resolve()
	if err != nil {
		return err
	}
	left := int64(1<<63 - 1)
	if wanted.Length != nil {
		left = *wanted.Length
	}
	if wanted.Offset < 0 || left < 0 {
		return faults.Invalid("offset or length")
	}
	// A pipe without a writer must not block this thread for ever, hence O_NONBLOCK; then it is refused.
	descriptor, err := syscall.Open(full, syscall.O_RDONLY|syscall.O_NONBLOCK|syscall.O_CLOEXEC|syscall.O_NOCTTY, 0)
	if err != nil {
		return named(full, err)
	}
	defer syscall.Close(descriptor)
	var found syscall.Stat_t
	if err := syscall.Fstat(descriptor, &found); err != nil {
		return named(full, err)
	}
	switch found.Mode & syscall.S_IFMT {
	case syscall.S_IFREG:
	case syscall.S_IFDIR:
		return named(full, syscall.EISDIR)
	case syscall.S_IFCHR, syscall.S_IFBLK:
		if wanted.Length == nil {
			return faults.Invalid("a device is read with a length")
		}
	default:
		return faults.Invalid("neither a file nor a device")
	}
	if wanted.Offset > 0 {
		if _, err := syscall.Seek(descriptor, wanted.Offset, io.SeekStart); err != nil {
			return named(full, err)
		}
	}
	if err := stream.Reply(describe(path.Base(full), &found, "")); err != nil {
		return err
	}
	sent, err := sendFile(stream, descriptor, left)
	if err != nil {
		return err
	}
	return stream.End(map[string]int64{"bytes": sent})
}

func sendFile(stream *session.Stream, descriptor int, left int64) (int64, error) {
	pooled := buffers.Get().(*[]byte)
	defer buffers.Put(pooled)
	buffer := *pooled
	var sent int64
	for left > 0 {
		granted, err := stream.Reserve(1, session.Chunk)
		if err != nil {
			return sent, err
		}
		room := min(int64(granted), left)
		count, err := syscall.Read(descriptor, buffer[frames.HeaderSize:frames.HeaderSize+room])
		if err == syscall.EINTR {
			count, err = 0, nil
			stream.Refund(granted)
			continue
		}
		if err != nil {
			return sent, err
		}
		stream.Refund(granted - count)
		if count == 0 {
			break
		}
		if err := stream.SendReserved(0, buffer, count); err != nil {
			return sent, err
		}
		sent += int64(count)
		left -= int64(count)
	}
	return sent, nil
}

type writeParams struct {
	where
	Mode    *uint32 `json:"mode"`
	Owner   string  `json:"owner"`
	Parents *bool   `json:"parents"`
	Size    *int64  `json:"size"`
}

func callWrite(stream *session.Stream, raw []byte) error {
	wanted, err := params[writeParams](raw)
	if err != nil {
		return err
	}
	full, err := wanted.resolve()
	if err != nil {
		return err
	}
	if full, err = followLinks(full); err != nil {
		return err
	}
	if wanted.Parents == nil || *wanted.Parents {
		if err := os.MkdirAll(path.Dir(full), 0o755); err != nil {
			return err
		}
	}
	mode, uid, gid, special, err := wanted.attributes(full)
	if err != nil {
		return err
	}
	var total int64
	if special {
		total, err = writeInPlace(stream, full)
	} else {
		total, err = replace(stream, full, mode, uid, gid, wanted.Size)
	}
	if err != nil {
		return err
	}
	return stream.Answer(map[string]int64{"bytes": total})
}

// attributes are those of the file that is replaced, unless others were asked for. `special` is what has no content
// to replace: a device, a pipe.
func (w *writeParams) attributes(full string) (mode uint32, uid, gid int, special bool, err error) {
	mode, uid, gid = 0o644, -1, -1
	var found syscall.Stat_t
	if syscall.Lstat(full, &found) == nil {
		switch found.Mode & syscall.S_IFMT {
		case syscall.S_IFREG:
			mode, uid, gid = found.Mode&permissionBits, int(found.Uid), int(found.Gid)
		case syscall.S_IFDIR:
			return 0, 0, 0, false, named(full, syscall.EISDIR)
		default:
			special = true
		}
	}
	if w.Owner != "" {
		if uid, gid, err = processes.FindOwner(w.Owner); err != nil {
			return 0, 0, 0, false, err
		}
	}
	mode, err = modeOr(w.Mode, mode)
	return mode, uid, gid, special, err
}

// followLinks returns the name that would be written through symbolic links, which may not exist yet.
func followLinks(full string) (string, error) {
	for range maxLinks {
		target, err := os.Readlink(full)
		if err != nil {
			return full, nil
		}
		if path.IsAbs(target) {
			full = target
		} else {
			full = path.Dir(full) + "/" + target
		}
	}
	return "", named(full, syscall.ELOOP)
}

func replace(stream *session.Stream, full string, mode uint32, uid, gid int, size *int64) (total int64, err error) {
	var random [8]byte
	_, _ = rand.Read(random[:])
	temporary := path.Dir(full) + "/" + temporaryPrefix + hex.EncodeToString(random[:])
	file, err := os.OpenFile(temporary, os.O_WRONLY|os.O_CREATE|os.O_EXCL|syscall.O_NOFOLLOW, 0o600)
	if err != nil {
		return 0, err
	}
	defer func() {
		_ = file.Close()
		if err != nil {
			_ = os.Remove(temporary)
		}
	}()
	if total, err = receive(stream, file); err != nil {
		return 0, err
	}
	if size != nil && *size != total {
		return 0, faults.Invalid("%d bytes came, %d were announced", total, *size)
	}
	if uid >= 0 {
		if err = file.Chown(uid, gid); err != nil {
			return 0, err
		}
	}
	if err = syscall.Fchmod(int(file.Fd()), mode); err != nil {
		return 0, named(full, err)
	}
	if err = file.Close(); err != nil {
		return 0, err
	}
	return total, os.Rename(temporary, full)
}

func writeInPlace(stream *session.Stream, full string) (int64, error) {
	file, err := os.OpenFile(full, os.O_WRONLY|syscall.O_NONBLOCK|syscall.O_NOCTTY, 0)
	if err != nil {
		return 0, err
	}
	defer file.Close()
	return receive(stream, file)
}

func receive(stream *session.Stream, file *os.File) (int64, error) {
	var total int64
	for {
		chunk, err := stream.Receive()
		if errors.Is(err, io.EOF) {
			return total, nil
		}
		if err != nil {
			return 0, err
		}
		if _, err := file.Write(chunk); err != nil {
			return 0, err
		}
		total += int64(len(chunk))
		frames.Recycle(chunk)
	}
}
