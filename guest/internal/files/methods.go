// Package files is the sandbox's file system as the host may use it. No file is ever held in memory as a whole, and
// names are bytes: Go strings keep whatever bytes a name has.
package files

import (
	"encoding/base64"
	"os"
	"path"
	"strings"
	"syscall"
	"time"
	"unicode/utf8"

	"pandastack/guest/internal/faults"
	"pandastack/guest/internal/frames"
	"pandastack/guest/internal/processes"
	"pandastack/guest/internal/session"
)

const (
	permissionBits = 0o7777
	maxListBatch   = 200
	maxBatchText   = 32 << 10 // before JSON escapes it, at most sixfold
)

// Methods returns what a host may call; see PROTOCOL.md, section 6.
func Methods() map[string]session.Method {
	return map[string]session.Method{
		"file.read":    callRead,
		"file.write":   callWrite,
		"file.stat":    callStat,
		"file.list":    callList,
		"file.mkdir":   callMkdir,
		"file.move":    callMove,
		"file.remove":  callRemove,
		"file.chmod":   callChmod,
		"file.watch":   callWatch,
		"file.scan":    callScan,
		"file.digests": callDigests,
	}
}

// where is a path in parameters, in one of its two spellings.
type where struct {
	Path    string `json:"path"`
	PathB64 string `json:"path_b64"`
}

func (w where) resolve() (string, error) { return resolve(w.Path, w.PathB64) }

func resolve(text, encoded string) (string, error) {
	if encoded != "" {
		raw, err := base64.StdEncoding.DecodeString(encoded)
		if err != nil || text != "" {
			return "", faults.Invalid("path or path_b64")
		}
		text = string(raw)
	}
	if !strings.HasPrefix(text, "/") || strings.ContainsRune(text, 0) {
		return "", faults.Invalid("a path is absolute and without NUL")
	}
	return text, nil
}

func params[T any](raw []byte) (*T, error) {
	into := new(T)
	if err := frames.Unmarshal(raw, into); err != nil {
		return nil, faults.Invalid("params: %v", err)
	}
	return into, nil
}

// Stat is one entry of a directory.
type Stat struct {
	Name      string `json:"name"`
	NameB64   string `json:"name_b64,omitempty"`
	Type      string `json:"type"`
	Size      int64  `json:"size"`
	Mode      uint32 `json:"mode"`
	MtimeNS   int64  `json:"mtime_ns"`
	UID       uint32 `json:"uid"`
	GID       uint32 `json:"gid"`
	Target    string `json:"target,omitempty"`
	TargetB64 string `json:"target_b64,omitempty"`
}

// spell returns a name for people, and its bytes if people's form cannot say them.
func spell(name string) (text, encoded string) {
	if utf8.ValidString(name) {
		return name, ""
	}
	return strings.ToValidUTF8(name, "\uFFFD"), base64.StdEncoding.EncodeToString([]byte(name))
}

func describe(name string, found *syscall.Stat_t, target string) Stat {
	stat := Stat{Type: "other", Size: found.Size, Mode: found.Mode & permissionBits, UID: found.Uid, GID: found.Gid,
		MtimeNS: time.Unix(found.Mtim.Unix()).UnixNano()}
	stat.Name, stat.NameB64 = spell(name)
	stat.Target, stat.TargetB64 = spell(target)
	switch found.Mode & syscall.S_IFMT {
	case syscall.S_IFREG:
		stat.Type = "file"
	case syscall.S_IFDIR:
		stat.Type = "directory"
	case syscall.S_IFLNK:
		stat.Type = "symlink"
	}
	return stat
}

func lookAt(full string, follow bool) (Stat, error) {
	var found syscall.Stat_t
	look := syscall.Lstat
	if follow {
		look = syscall.Stat
	}
	if err := look(full, &found); err != nil {
		return Stat{}, named(full, err)
	}
	target := ""
	if found.Mode&syscall.S_IFMT == syscall.S_IFLNK {
		target, _ = os.Readlink(full)
	}
	return describe(path.Base(full), &found, target), nil
}

// named puts the path into the error's text, as the os package does.
func named(full string, err error) error {
	return &os.PathError{Op: "file", Path: full, Err: err}
}

func callStat(stream *session.Stream, raw []byte) error {
	wanted, err := params[struct {
		where
		Follow *bool `json:"follow"`
	}](raw)
	if err != nil {
		return err
	}
	full, err := wanted.resolve()
	if err != nil {
		return err
	}
	stat, err := lookAt(full, wanted.Follow == nil || *wanted.Follow)
	if err != nil {
		return err
	}
	return stream.Answer(stat)
}

func callList(stream *session.Stream, raw []byte) error {
	wanted, err := params[where](raw)
	if err != nil {
		return err
	}
	full, err := wanted.resolve()
	if err != nil {
		return err
	}
	directory, err := os.OpenFile(full, os.O_RDONLY|syscall.O_DIRECTORY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return err
	}
	defer directory.Close()
	if err := stream.Reply(struct{}{}); err != nil {
		return err
	}
	count := 0
	for {
		names, err := directory.Readdirnames(maxListBatch)
		batch, size := []Stat{}, 0
		for _, name := range names {
			stat, err := lookAt(full+"/"+name, false)
			if err != nil {
				continue // It went away between the look at the directory and the look at it.
			}
			batch = append(batch, stat)
			size += len(stat.Name) + len(stat.Target)
			count++
			if size > maxBatchText {
				if err := stream.SendJSON(map[string][]Stat{"entries": batch}); err != nil {
					return err
				}
				batch, size = []Stat{}, 0
			}
		}
		if len(batch) > 0 {
			if err := stream.SendJSON(map[string][]Stat{"entries": batch}); err != nil {
				return err
			}
		}
		if err != nil || len(names) == 0 {
			break
		}
	}
	return stream.End(map[string]int{"count": count})
}

func callMkdir(stream *session.Stream, raw []byte) error {
	wanted, err := params[struct {
		where
		Parents *bool   `json:"parents"`
		Mode    *uint32 `json:"mode"`
	}](raw)
	if err != nil {
		return err
	}
	full, err := wanted.resolve()
	if err != nil {
		return err
	}
	mode, err := modeOr(wanted.Mode, 0o755)
	if err != nil {
		return err
	}
	parents := wanted.Parents == nil || *wanted.Parents
	if parents {
		if err := os.MkdirAll(path.Dir(path.Clean(full)), 0o755); err != nil {
			return err
		}
	}
	err = syscall.Mkdir(full, mode)
	if err == syscall.EEXIST && parents {
		if stat, statErr := lookAt(full, true); statErr == nil && stat.Type == "directory" {
			return stream.Answer(map[string]bool{"created": false})
		}
	}
	if err == nil {
		err = syscall.Chmod(full, mode) // The umask must not take from a mode that was asked for.
	}
	if err != nil {
		return named(full, err)
	}
	return stream.Answer(map[string]bool{"created": true})
}

func modeOr(wanted *uint32, otherwise uint32) (uint32, error) {
	if wanted == nil {
		return otherwise, nil
	}
	if *wanted > permissionBits {
		return 0, faults.Invalid("mode %#o", *wanted)
	}
	return *wanted, nil
}

func callRemove(stream *session.Stream, raw []byte) error {
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
	if path.Clean(full) == "/" {
		return faults.Invalid("the root directory cannot be removed")
	}
	if _, err := lookAt(full, false); err != nil {
		return err // RemoveAll is silent about what does not exist.
	}
	if wanted.Recursive {
		err = os.RemoveAll(full)
	} else {
		err = os.Remove(full)
	}
	if err != nil {
		return err
	}
	return stream.Answer(struct{}{})
}

func callChmod(stream *session.Stream, raw []byte) error {
	wanted, err := params[struct {
		where
		Mode      *uint32 `json:"mode"`
		Owner     string  `json:"owner"`
		Recursive bool    `json:"recursive"`
	}](raw)
	if err != nil {
		return err
	}
	full, err := wanted.resolve()
	if err != nil {
		return err
	}
	mode, err := modeOr(wanted.Mode, 0)
	if err != nil {
		return err
	}
	uid, gid := -1, -1
	if wanted.Owner != "" {
		if uid, gid, err = processes.FindOwner(wanted.Owner); err != nil {
			return err
		}
	}
	change := func(one string) error {
		if uid >= 0 {
			if err := os.Chown(one, uid, gid); err != nil {
				return err
			}
		}
		if wanted.Mode != nil { // After chown, which clears the set-id bits.
			return named2(one, syscall.Chmod(one, mode))
		}
		return nil
	}
	if err := change(full); err != nil {
		return err
	}
	if wanted.Recursive {
		if err := below(full, change); err != nil {
			return err
		}
	}
	return stream.Answer(struct{}{})
}

func named2(full string, err error) error {
	if err == nil {
		return nil
	}
	return named(full, err)
}

// below calls visit for everything under a directory, symbolic links left out and not followed.
func below(directory string, visit func(string) error) error {
	entries, err := os.ReadDir(directory)
	if err != nil {
		if stat, statErr := lookAt(directory, true); statErr == nil && stat.Type != "directory" {
			return nil
		}
		return err
	}
	for _, entry := range entries {
		if entry.Type()&os.ModeSymlink != 0 {
			continue
		}
		full := directory + "/" + entry.Name()
		if err := visit(full); err != nil {
			return err
		}
		if entry.IsDir() {
			if err := below(full, visit); err != nil {
				return err
			}
		}
	}
	return nil
}
