package files

import (
	"errors"
	"io"
	"os"
	"path"
	"runtime"
	"strings"
	"syscall"
	"unsafe"

	"pandastack/guest/internal/faults"
	"pandastack/guest/internal/session"
)

const (
	renameNoReplace = 1
	atCurrent       = -100 // AT_FDCWD
)

func callMove(stream *session.Stream, raw []byte) error {
	wanted, err := params[struct {
		From      string `json:"from"`
		FromB64   string `json:"from_b64"`
		To        string `json:"to"`
		ToB64     string `json:"to_b64"`
		Overwrite bool   `json:"overwrite"`
	}](raw)
	if err != nil {
		return err
	}
	from, err := resolve(wanted.From, wanted.FromB64)
	if err != nil {
		return err
	}
	to, err := resolve(wanted.To, wanted.ToB64)
	if err != nil {
		return err
	}
	if wanted.Overwrite {
		err = syscall.Rename(from, to)
	} else {
		err = renameNew(from, to)
	}
	if err == syscall.EXDEV {
		err = moveAcross(from, to, wanted.Overwrite)
	}
	var errno syscall.Errno
	if errors.As(err, &errno) && errno == syscall.ENOENT {
		if _, missing := lookAt(from, false); missing != nil {
			return missing
		}
	}
	if err != nil {
		return named2(to, err)
	}
	return stream.Answer(struct{}{})
}

// renameNew lets the kernel refuse an existing target; where it cannot, a look before is the best there is.
func renameNew(from, to string) error {
	number := uintptr(316)
	if runtime.GOARCH == "arm64" {
		number = 276
	}
	fromText, err := syscall.BytePtrFromString(from)
	if err != nil {
		return err
	}
	toText, err := syscall.BytePtrFromString(to)
	if err != nil {
		return err
	}
	current := atCurrent
	_, _, errno := syscall.Syscall6(number, uintptr(current), uintptr(unsafe.Pointer(fromText)), uintptr(current),
		uintptr(unsafe.Pointer(toText)), renameNoReplace, 0)
	switch errno {
	case 0:
		return nil
	case syscall.EINVAL, syscall.ENOSYS:
		if _, err := os.Lstat(to); err == nil {
			return syscall.EEXIST
		}
		return syscall.Rename(from, to)
	}
	return errno
}

// moveAcross copies to a temporary name on the target's file system, renames, and only then removes the source.
func moveAcross(from, to string, overwrite bool) error {
	if strings.HasPrefix(path.Clean(to)+"/", path.Clean(from)+"/") {
		return faults.Invalid("a directory cannot move into itself")
	}
	if _, err := os.Lstat(to); err == nil && !overwrite {
		return syscall.EEXIST
	}
	temporary, err := os.MkdirTemp(path.Dir(path.Clean(to)), temporaryPrefix+"move-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(temporary)
	if err := copyTree(from, temporary+"/it"); err != nil {
		return err
	}
	if err := syscall.Rename(temporary+"/it", to); err != nil {
		return err
	}
	return os.RemoveAll(from)
}

func copyTree(from, to string) error {
	var found syscall.Stat_t
	if err := syscall.Lstat(from, &found); err != nil {
		return err
	}
	mode := found.Mode & permissionBits
	switch found.Mode & syscall.S_IFMT {
	case syscall.S_IFLNK:
		target, err := os.Readlink(from)
		if err == nil {
			err = os.Symlink(target, to)
		}
		if err == nil {
			err = os.Lchown(to, int(found.Uid), int(found.Gid))
		}
		return err
	case syscall.S_IFDIR:
		if err := os.Mkdir(to, 0o700); err != nil {
			return err
		}
		entries, err := os.ReadDir(from)
		if err != nil {
			return err
		}
		for _, entry := range entries {
			if err := copyTree(from+"/"+entry.Name(), to+"/"+entry.Name()); err != nil {
				return err
			}
		}
	case syscall.S_IFREG:
		if err := copyFile(from, to); err != nil {
			return err
		}
	default:
		if err := syscall.Mknod(to, found.Mode, int(found.Rdev)); err != nil {
			return err
		}
	}
	if err := os.Chown(to, int(found.Uid), int(found.Gid)); err != nil {
		return err
	}
	if err := syscall.Chmod(to, mode); err != nil {
		return err
	}
	return syscall.UtimesNano(to, []syscall.Timespec{found.Atim, found.Mtim})
}

func copyFile(from, to string) error {
	source, err := os.Open(from)
	if err != nil {
		return err
	}
	defer source.Close()
	target, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	if _, err := io.Copy(target, source); err != nil {
		_ = target.Close()
		return err
	}
	return target.Close()
}
