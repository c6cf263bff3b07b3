package files

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io"
	"os"
	"path"
	"sort"
	"strings"
	"syscall"
	"time"

	"pandastack/guest/internal/faults"
	"pandastack/guest/internal/session"
)

const (
	maxScanned     = 1 << 20
	maxScanBatch   = 500
	maxDigestPaths = 1000
	maxDigestBatch = 100
)

// Scanned is one entry of a tree; its path is relative to the tree's root, which itself is "".
type Scanned struct {
	Path      string `json:"path"`
	PathB64   string `json:"path_b64,omitempty"`
	Type      string `json:"type"`
	Size      int64  `json:"size"`
	Mode      uint32 `json:"mode"`
	UID       uint32 `json:"uid"`
	GID       uint32 `json:"gid"`
	MtimeNS   int64  `json:"mtime_ns"`
	CtimeNS   int64  `json:"ctime_ns"`
	Pristine  bool   `json:"pristine"`
	Target    string `json:"target,omitempty"`
	TargetB64 string `json:"target_b64,omitempty"`
}

// scan walks one tree and sends what it finds in batches.
type scan struct {
	stream   *session.Stream
	root     string
	device   uint64 // of the root's directories: what is on another one is another file system
	writable uint64 // of files that were written here; 0 if that is not known
	limit    int
	count    int
	batch    []Scanned
	text     int
}

func callScan(stream *session.Stream, raw []byte) error {
	wanted, err := params[struct {
		where
		Limit int `json:"limit"`
	}](raw)
	if err != nil {
		return err
	}
	full, err := wanted.resolve()
	if err != nil {
		return err
	}
	if wanted.Limit < 1 || wanted.Limit > maxScanned {
		return faults.Invalid("limit is from 1 to %d", maxScanned)
	}
	var found syscall.Stat_t
	if err := syscall.Lstat(full, &found); err != nil {
		return named(full, err)
	}
	if err := stream.Reply(struct{}{}); err != nil {
		return err
	}
	work := &scan{stream: stream, root: path.Clean(full), device: found.Dev, writable: writable(found.Dev), limit: wanted.Limit}
	if err := work.visit("", &found); err != nil {
		return err
	}
	if err := work.flush(); err != nil {
		return err
	}
	return stream.End(map[string]int{"count": work.count})
}

// writable is the device of files that are written to the root file system, 0 if that is not known or `device` is another
// one. Where an overlay gives it a number of its own, files with another number are those of the image, as it was made. A
// changed time would not do: gVisor sets none when a file is written through shared memory.
func writable(device uint64) uint64 {
	var root, found syscall.Stat_t
	if syscall.Stat("/", &root) != nil || root.Dev != device {
		return 0
	}
	file, err := os.CreateTemp("/", temporaryPrefix)
	if err != nil {
		return 0
	}
	defer file.Close()
	_ = os.Remove(file.Name())
	if syscall.Fstat(int(file.Fd()), &found) != nil {
		return 0
	}
	return found.Dev
}

func (s *scan) visit(relative string, found *syscall.Stat_t) error {
	if err := s.add(relative, found); err != nil {
		return err
	}
	if found.Mode&syscall.S_IFMT != syscall.S_IFDIR {
		return nil
	}
	for _, name := range namesOf(s.full(relative), s.limit-s.count) {
		if strings.HasPrefix(name, temporaryPrefix) {
			continue // An upload that is under way.
		}
		below := name
		if relative != "" {
			below = relative + "/" + name
		}
		var found syscall.Stat_t
		if syscall.Lstat(s.full(below), &found) != nil {
			continue // It went away, or its path is longer than Linux takes.
		}
		if found.Mode&syscall.S_IFMT == syscall.S_IFDIR && found.Dev != s.device {
			continue // Another file system is mounted here.
		}
		if err := s.visit(below, &found); err != nil {
			return err
		}
	}
	return nil
}

func (s *scan) full(relative string) string {
	if relative == "" {
		return s.root
	}
	return strings.TrimSuffix(s.root, "/") + "/" + relative
}

// namesOf is what a directory holds, in the order of bytes; nothing if it went away.
func namesOf(full string, most int) []string {
	directory, err := os.OpenFile(full, os.O_RDONLY|syscall.O_DIRECTORY|syscall.O_NONBLOCK|syscall.O_NOFOLLOW, 0)
	if err != nil {
		return nil
	}
	defer directory.Close()
	// One more than may come tells that there are too many, and takes no more memory than they may.
	names, _ := directory.Readdirnames(most + 1)
	sort.Strings(names)
	return names
}

func (s *scan) add(relative string, found *syscall.Stat_t) error {
	if s.count++; s.count > s.limit {
		return faults.New("too_large", "the tree has more entries than %d", s.limit)
	}
	target := ""
	if found.Mode&syscall.S_IFMT == syscall.S_IFLNK {
		target, _ = os.Readlink(s.full(relative))
	}
	stat := describe("", found, target)
	entry := Scanned{Type: stat.Type, Size: stat.Size, Mode: stat.Mode, UID: stat.UID, GID: stat.GID, MtimeNS: stat.MtimeNS,
		CtimeNS: time.Unix(found.Ctim.Unix()).UnixNano(), Pristine: s.writable != 0 && found.Dev != s.writable,
		Target: stat.Target, TargetB64: stat.TargetB64}
	entry.Path, entry.PathB64 = spell(relative)
	s.batch = append(s.batch, entry)
	s.text += len(entry.Path) + len(entry.Target)
	if len(s.batch) >= maxScanBatch || s.text > maxBatchText/2 {
		return s.flush()
	}
	return nil
}

func (s *scan) flush() error {
	if len(s.batch) == 0 {
		return nil
	}
	err := s.stream.SendJSON(map[string][]Scanned{"entries": s.batch})
	s.batch, s.text = s.batch[:0], 0
	return err
}

func callDigests(stream *session.Stream, raw []byte) error {
	wanted, err := params[struct {
		Paths []string `json:"paths_b64"`
	}](raw)
	if err != nil {
		return err
	}
	if len(wanted.Paths) > maxDigestPaths {
		return faults.Invalid("more than %d paths", maxDigestPaths)
	}
	paths := make([]string, len(wanted.Paths))
	for index, encoded := range wanted.Paths {
		if paths[index], err = resolve("", encoded); err != nil {
			return err
		}
	}
	if err := stream.Reply(struct{}{}); err != nil {
		return err
	}
	digests := []*string{}
	for index, full := range paths {
		digest, err := digestOf(stream, full)
		if err != nil {
			return err
		}
		digests = append(digests, digest)
		if len(digests) == maxDigestBatch || index == len(paths)-1 {
			if err := stream.SendJSON(map[string][]*string{"digests": digests}); err != nil {
				return err
			}
			digests = digests[:0]
		}
	}
	return stream.End(map[string]int{"count": len(paths)})
}

// digestOf is the SHA-256 of a file's content, nil for what is no file (any more).
func digestOf(stream *session.Stream, full string) (*string, error) {
	file, err := os.OpenFile(full, os.O_RDONLY|syscall.O_NONBLOCK|syscall.O_NOFOLLOW|syscall.O_NOCTTY, 0)
	if err != nil {
		return nil, nil
	}
	defer file.Close()
	found, err := file.Stat()
	if err != nil || !found.Mode().IsRegular() {
		return nil, nil
	}
	pooled := buffers.Get().(*[]byte)
	defer buffers.Put(pooled)
	hash, left := sha256.New(), found.Size() // What is appended meanwhile is not of this moment.
	for left > 0 {
		if stream.Aborted() {
			return nil, session.ErrAborted
		}
		count, err := file.Read((*pooled)[:min(left, int64(len(*pooled)))])
		hash.Write((*pooled)[:count])
		left -= int64(count)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return nil, nil
		}
	}
	digest := hex.EncodeToString(hash.Sum(nil))
	return &digest, nil
}
