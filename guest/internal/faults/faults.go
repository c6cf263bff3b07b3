// Package faults has the typed errors that cross to the host: a code, a text, and Linux's number if there is one.
package faults

import (
	"errors"
	"fmt"
	"io/fs"
	"syscall"
)

type Fault struct {
	Code    string `json:"code"`
	Message string `json:"message"`
	Errno   int    `json:"errno,omitempty"`
}

func (f *Fault) Error() string { return f.Code + ": " + f.Message }

func New(code, format string, arguments ...any) *Fault {
	return &Fault{Code: code, Message: fmt.Sprintf(format, arguments...)}
}

func Invalid(format string, arguments ...any) *Fault { return New("invalid", format, arguments...) }

var codes = map[syscall.Errno]string{
	syscall.ENOENT:       "not_found",
	syscall.ENOTDIR:      "not_a_directory",
	syscall.EISDIR:       "is_a_directory",
	syscall.EEXIST:       "exists",
	syscall.EACCES:       "permission",
	syscall.EPERM:        "permission",
	syscall.ENOSPC:       "no_space",
	syscall.EDQUOT:       "no_space",
	syscall.ENOTEMPTY:    "not_empty",
	syscall.EROFS:        "read_only",
	syscall.EBUSY:        "busy",
	syscall.ETXTBSY:      "busy",
	syscall.ELOOP:        "invalid",
	syscall.EINVAL:       "invalid",
	syscall.ENAMETOOLONG: "invalid",
	syscall.EFBIG:        "too_large",
}

// From turns any error into a Fault; errors of the system keep their number.
func From(err error) *Fault {
	var fault *Fault
	if errors.As(err, &fault) {
		return fault
	}
	var errno syscall.Errno
	if errors.As(err, &errno) {
		code, known := codes[errno]
		if !known {
			code = "io"
		}
		return &Fault{Code: code, Message: err.Error(), Errno: int(errno)}
	}
	if errors.Is(err, fs.ErrNotExist) {
		return New("not_found", "%v", err)
	}
	return New("internal", "%v", err)
}
