package machine

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"runtime/debug"
	"syscall"
	"time"

	"pandastack/guest/internal/faults"
	"pandastack/guest/internal/frames"
	"pandastack/guest/internal/session"
)

const (
	HookDirectory  = "/etc/pandastack/hooks"
	beforeSnapshot = "before-snapshot"
	afterRestore   = "after-restore"
	defaultHookMS  = 10_000
	maxHookMS      = 120_000
)

var validReason = regexp.MustCompile(`^[a-z-]{1,32}$`)

type seal struct {
	Freeze bool   `json:"freeze"`
	Reason string `json:"reason"`
	HookMS *int64 `json:"hook_timeout_ms"`
}

// hookLimit is how long a hook may take.
func hookLimit(wantedMS *int64) (time.Duration, error) {
	limit := int64(defaultHookMS)
	if wantedMS != nil {
		limit = *wantedMS
	}
	if limit < 1 || limit > maxHookMS {
		return 0, faults.Invalid("hook_timeout_ms is from 1 to %d", maxHookMS)
	}
	return time.Duration(limit) * time.Millisecond, nil
}

// hook returns the path of a hook, empty if there is none that may be executed.
func (m *Machine) hook(name string) (string, error) {
	path := filepath.Join(m.Hooks, name)
	info, err := os.Stat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTDIR):
		return "", nil
	case err != nil:
		return "", faults.New("hook_failed", "%v", err)
	case !info.Mode().IsRegular() || info.Mode()&0o111 == 0:
		return "", nil
	}
	return path, nil
}

// callSeal prepares this machine for being saved. The hook of its owner comes first, while all still runs.
func (m *Machine) callSeal(stream *session.Stream, raw []byte) error {
	wanted := seal{Reason: "snapshot"}
	if err := frames.Unmarshal(raw, &wanted); err != nil {
		return faults.Invalid("params: %v", err)
	}
	limit, err := hookLimit(wanted.HookMS)
	if err != nil {
		return err
	}
	if !validReason.MatchString(wanted.Reason) {
		return faults.Invalid("reason %.80q", wanted.Reason)
	}
	m.operation.Lock()
	defer m.operation.Unlock()
	sealed, frozen := m.state()
	if !sealed {
		path, err := m.hook(beforeSnapshot)
		if err == nil && path != "" {
			err = m.Processes.Hook(path, wanted.Reason, limit, stream.Done())
		}
		if err != nil {
			return err
		}
	}
	// What the daemon frees now is not in the snapshot, and not in every sandbox made from it.
	debug.FreeOSMemory()
	if stream.Aborted() {
		return session.ErrAborted // Whoever asked would not know that it has to unseal.
	}
	m.close(wanted.Freeze)
	stopped := 0
	if wanted.Freeze || frozen {
		if stopped, err = m.Processes.Freeze(); err != nil {
			m.open(sealed)
			return err
		}
	}
	live, _ := m.Processes.Counts()
	return stream.Answer(map[string]int{"live": live, "frozen": stopped})
}

// callUnseal takes a seal back: this is still the machine it was.
func (m *Machine) callUnseal(stream *session.Stream, raw []byte) error {
	var none struct{}
	if err := frames.Unmarshal(raw, &none); err != nil {
		return faults.Invalid("params: %v", err)
	}
	m.operation.Lock()
	defer m.operation.Unlock()
	if stream.Aborted() {
		return session.ErrAborted
	}
	continued := m.Processes.Continue()
	m.open(false)
	return stream.Answer(map[string]int{"continued": continued})
}

func (m *Machine) state() (sealed, frozen bool) {
	m.mutex.Lock()
	defer m.mutex.Unlock()
	return m.sealed, m.thawed != nil
}

// close seals; with `hold` calls wait from here on instead of being refused.
func (m *Machine) close(hold bool) {
	m.mutex.Lock()
	defer m.mutex.Unlock()
	m.sealed = true
	if hold && m.thawed == nil {
		m.thawed = make(chan struct{})
	}
}

// open lets the calls go on that waited; `sealed` ones are refused then.
func (m *Machine) open(sealed bool) {
	m.mutex.Lock()
	defer m.mutex.Unlock()
	m.sealed = sealed
	if m.thawed != nil {
		close(m.thawed)
		m.thawed = nil
	}
}
