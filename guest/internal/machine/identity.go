package machine

import (
	"bytes"
	"encoding/base64"
	"errors"
	"fmt"
	"os"
	"regexp"
	"strings"
	"syscall"
	"time"
	"unsafe"

	"pandastack/guest/internal/faults"
	"pandastack/guest/internal/frames"
	"pandastack/guest/internal/session"
)

const (
	entropyBytes   = 64
	clockTolerance = 50 * time.Millisecond
	rndAddEntropy  = 0x40085203
	rndReseed      = 0x5207

	capabilityVersion = 0x20080522
	capSysTime        = 25

	machineIDFile   = "/etc/machine-id"
	hostsMark       = "# pandastack"
	maxTokenBytes   = 1024
	identityFileMax = 1 << 20
)

var (
	validHostname  = regexp.MustCompile(`^[A-Za-z0-9]([A-Za-z0-9.-]{0,62}[A-Za-z0-9])?$`)
	validMachineID = regexp.MustCompile(`^[0-9a-f]{32}$`)
)

type identity struct {
	SandboxID string            `json:"sandbox_id"`
	Hostname  string            `json:"hostname"`
	UnixNS    int64             `json:"unix_ns"`
	Entropy   string            `json:"entropy_b64"`
	Token     string            `json:"token"`
	Env       map[string]string `json:"env"`
	MachineID string            `json:"machine_id"`
	HookMS    *int64            `json:"hook_timeout_ms"`
}

type step struct {
	OK     bool   `json:"ok"`
	Detail string `json:"detail"`
}

func outcome(detail string, err error) step {
	if err != nil {
		return step{false, err.Error()}
	}
	return step{true, detail}
}

// identitySteps is the order of the steps that come before any code of a user.
var identitySteps = []string{"entropy", "clock", "hostname", "machine_id", "boot_id", "disk", "env", "token"}

// parseIdentity checks what an identity brings.
func parseIdentity(raw []byte) (wanted identity, entropy []byte, err error) {
	if err := frames.Unmarshal(raw, &wanted); err != nil {
		return wanted, nil, faults.Invalid("params: %v", err)
	}
	entropy, err = base64.StdEncoding.DecodeString(wanted.Entropy)
	if err != nil || len(entropy) != entropyBytes {
		return wanted, nil, faults.Invalid("entropy_b64 is base64 of %d bytes", entropyBytes)
	}
	if !validHostname.MatchString(wanted.Hostname) || wanted.UnixNS <= 0 || len(wanted.Token) > maxTokenBytes ||
		wanted.MachineID != "" && !validMachineID.MatchString(wanted.MachineID) {
		return wanted, nil, faults.Invalid("hostname, unix_ns, token or machine_id")
	}
	for name, value := range wanted.Env {
		if name == "" || strings.ContainsAny(name, "=\x00") || strings.ContainsRune(value, 0) {
			return wanted, nil, faults.Invalid("env %.80q", name)
		}
	}
	return wanted, entropy, nil
}

// callIdentity makes this copy of a machine itself. The order matters: no random number may be drawn before the
// entropy, no time read before the clock, and user code starts only when all is done. A sealed machine with a step that
// failed stays sealed, and frozen: what it would do is not what its owner may expect.
func (m *Machine) callIdentity(stream *session.Stream, raw []byte) error {
	arrived := time.Now()
	wanted, entropy, err := parseIdentity(raw)
	if err != nil {
		return err
	}
	limit, err := hookLimit(wanted.HookMS)
	if err != nil {
		return err
	}
	m.operation.Lock()
	defer m.operation.Unlock()
	if stream.Aborted() {
		return session.ErrAborted
	}
	sealed, frozen := m.state()
	if frozen {
		m.EndOthers(stream)
	}
	steps, offset := m.become(wanted, entropy, arrived)
	environment := map[string]string{}
	for name, value := range wanted.Env {
		environment[name] = value
	}
	if wanted.SandboxID != "" {
		environment["PANDASTACK_SANDBOX_ID"] = wanted.SandboxID
	}
	m.Processes.SetEnvironment(environment)
	steps["env"] = step{true, fmt.Sprintf("%d names", len(environment))}
	m.mutex.Lock()
	m.token = wanted.Token
	m.mutex.Unlock()
	steps["token"] = step{true, "set"}
	failed := firstFailed(steps)
	if steps["hooks"], err = m.restoreHook(failed, limit, stream); err != nil {
		return err
	}
	if failed == "" && !steps["hooks"].OK {
		failed = "hooks"
	}
	if sealed && failed != "" {
		steps["processes"] = step{false, "not continued: " + failed + " failed"}
	} else {
		steps["processes"] = step{true, fmt.Sprintf("%d continued", m.Processes.Continue())}
		m.mutex.Lock()
		m.lastCall = time.Now()
		m.mutex.Unlock()
		m.open(false)
	}
	return stream.Answer(map[string]any{"steps": steps, "offset_ns": offset})
}

// become does what of an identity is the kernel's and the file system's.
func (m *Machine) become(wanted identity, entropy []byte, arrived time.Time) (steps map[string]step, offsetNS int64) {
	steps = map[string]step{"entropy": outcome(reseed(entropy))}
	offsetNS, detail, err := setClock(wanted.UnixNS, arrived)
	steps["clock"] = outcome(detail, err)
	steps["hostname"] = outcome("set", setHostname(wanted.Hostname))
	steps["machine_id"] = step{true, "kept"}
	if wanted.MachineID != "" {
		steps["machine_id"] = outcome("set", overwrite(machineIDFile, []byte(wanted.MachineID+"\n")))
	}
	steps["boot_id"] = outcome(m.Own.renewBootID())
	steps["disk"] = outcome(m.Own.grow())
	return steps, offsetNS
}

// callRehearse does once what an identity and the first command after it will do. What code they need is then read, in
// memory and, where the processor is emulated, translated before anybody waits for it. What it sets the identity sets again.
func (m *Machine) callRehearse(stream *session.Stream, raw []byte) error {
	arrived := time.Now()
	wanted, entropy, err := parseIdentity(raw)
	if err != nil {
		return err
	}
	m.operation.Lock()
	defer m.operation.Unlock()
	if sealed, frozen := m.state(); !sealed || frozen {
		return faults.Invalid("only a machine that is sealed, and not frozen, can rehearse")
	}
	steps, offset := m.become(wanted, entropy, arrived)
	if err := m.Processes.Rehearse(defaultHookMS*time.Millisecond, stream.Done()); err != nil {
		return err
	}
	return stream.Answer(map[string]any{"steps": steps, "offset_ns": offset})
}

func firstFailed(steps map[string]step) string {
	for _, name := range identitySteps {
		if !steps[name].OK {
			return name
		}
	}
	return ""
}

// restoreHook runs after-restore, if there is one. It is code of a user, so it does not run on a machine that is not ready.
func (m *Machine) restoreHook(failed string, limit time.Duration, stream *session.Stream) (step, error) {
	path, err := m.hook(afterRestore)
	switch {
	case err == nil && path == "":
		return step{true, "none"}, nil
	case err == nil && failed != "":
		return step{false, "not run: " + failed + " failed"}, nil
	case err == nil:
		err = m.Processes.Hook(path, "restore", limit, stream.Done())
	}
	switch {
	case errors.Is(err, session.ErrAborted):
		return step{}, err
	case err != nil:
		return step{false, faults.From(err).Message}, nil
	}
	return step{true, "run"}, nil
}

func reseed(entropy []byte) (string, error) {
	descriptor, err := syscall.Open("/dev/urandom", syscall.O_WRONLY|syscall.O_CLOEXEC, 0)
	if err != nil {
		return "", err
	}
	defer syscall.Close(descriptor)
	pool := struct {
		bits, size int32
		bytes      [entropyBytes]byte
	}{bits: 8 * entropyBytes, size: entropyBytes}
	copy(pool.bytes[:], entropy)
	_, _, errno := syscall.Syscall(syscall.SYS_IOCTL, uintptr(descriptor), rndAddEntropy, uintptr(unsafe.Pointer(&pool)))
	switch errno {
	case 0:
	case syscall.ENOTTY, syscall.ENOSYS, syscall.EINVAL:
		// gVisor has no pool of its own: each read of random bytes comes from the host.
		return "runtime", nil
	default:
		return "", errno
	}
	if _, _, errno = syscall.Syscall(syscall.SYS_IOCTL, uintptr(descriptor), rndReseed, 0); errno != 0 {
		return "", errno
	}
	return "kernel", nil
}

// setClock steps the wall clock if it is off; time spent since the call arrived is added to the host's time.
func setClock(hostUnixNS int64, arrived time.Time) (offsetNS int64, detail string, err error) {
	offsetNS = arrived.UnixNano() - hostUnixNS
	if offsetNS > -int64(clockTolerance) && offsetNS < int64(clockTolerance) {
		return offsetNS, "kept", nil
	}
	now := syscall.NsecToTimespec(hostUnixNS + int64(time.Since(arrived)))
	_, _, errno := syscall.Syscall(syscall.SYS_CLOCK_SETTIME, 0, uintptr(unsafe.Pointer(&now)), 0)
	switch {
	case errno == 0:
		return offsetNS, "stepped", nil
	case errno == syscall.ENOSYS || errno == syscall.EPERM && maySetClock():
		// This kernel has no clock of its own: gVisor's is the host's, and what was seen is how long the call was under way.
		// The host judges that.
		return offsetNS, "runtime", nil
	}
	return offsetNS, "", fmt.Errorf("clock_settime: %w", errno)
}

// maySetClock says whether this process has the capability for it.
func maySetClock() bool {
	header := struct {
		version uint32
		pid     int32
	}{version: capabilityVersion}
	var data [2]struct{ effective, permitted, inheritable uint32 }
	_, _, errno := syscall.RawSyscall(syscall.SYS_CAPGET, uintptr(unsafe.Pointer(&header)), uintptr(unsafe.Pointer(&data)), 0)
	return errno == 0 && data[0].effective&(1<<capSysTime) != 0
}

func setHostname(name string) error {
	kernel := syscall.Sethostname([]byte(name))
	if err := overwrite("/etc/hostname", []byte(name+"\n")); err != nil {
		return err
	}
	hosts, err := os.ReadFile("/etc/hosts")
	if err != nil && !os.IsNotExist(err) || len(hosts) > identityFileMax {
		return fmt.Errorf("/etc/hosts: %v", err)
	}
	var kept bytes.Buffer
	for line := range bytes.Lines(hosts) {
		if !bytes.HasSuffix(bytes.TrimSpace(line), []byte(hostsMark)) {
			kept.Write(line)
		}
	}
	if kept.Len() > 0 && !bytes.HasSuffix(kept.Bytes(), []byte("\n")) {
		kept.WriteByte('\n')
	}
	fmt.Fprintf(&kept, "127.0.1.1 %s %s\n", name, hostsMark)
	if err := overwrite("/etc/hosts", kept.Bytes()); err != nil {
		return err
	}
	if kernel != nil {
		return fmt.Errorf("sethostname: %w", kernel)
	}
	return nil
}

// overwrite keeps the inode: these files may be bind mounts, over which nothing can be renamed. And it keeps the blocks: a file
// that was emptied first goes to the disk when it is closed.
func overwrite(path string, content []byte) error {
	file, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE, 0o644)
	if err != nil {
		return err
	}
	_, err = file.Write(content)
	if err == nil {
		var info os.FileInfo
		if info, err = file.Stat(); err == nil && info.Size() > int64(len(content)) {
			err = file.Truncate(int64(len(content)))
		}
	}
	if closed := file.Close(); err == nil {
		err = closed
	}
	return err
}
