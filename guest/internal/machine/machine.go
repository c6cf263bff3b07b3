// Package machine is what the host asks of the sandbox as a whole: identity, sealing, health, resources and ports.
package machine

import (
	"crypto/subtle"
	"os"
	"strings"
	"sync"
	"time"

	"pandastack/guest/internal/faults"
	"pandastack/guest/internal/frames"
	"pandastack/guest/internal/session"
)

// Processes is what this package needs to know of them.
type Processes interface {
	Counts() (live, baked int)
	Strays() int
	SetEnvironment(environment map[string]string)
	Freeze() (stopped int, err error)
	Continue() (continued int)
	Hook(path, reason string, limit time.Duration, cancel <-chan struct{}) error
	Rehearse(limit time.Duration, cancel <-chan struct{}) error
}

// Machine keeps the state that identity changes: running -> sealed -> running, or running -> sealed and frozen -> running.
type Machine struct {
	Build      string
	Processes  Processes
	ListenPort uint16                       // left out of machine.ports; 0 for none
	EndOthers  func(stream *session.Stream) // ends all sessions but this one's
	Hooks      string                       // the directory of before-snapshot and after-restore
	Own        *Own                         // nil where the kernel is not this machine's own

	operation sync.Mutex // one seal, unseal or identity at a time

	mutex    sync.Mutex
	started  time.Time
	sealed   bool
	thawed   chan struct{} // while frozen; closed when calls may go on
	token    string
	calls    int       // running calls that are not about the machine
	lastCall time.Time // when the last of them ended
}

func New(build string, processes Processes) *Machine {
	now := time.Now()
	return &Machine{Build: build, Processes: processes, EndOthers: func(*session.Stream) {}, Hooks: HookDirectory, started: now,
		lastCall: now}
}

// Methods returns what a host may call; see PROTOCOL.md, section 7.
func (m *Machine) Methods() map[string]session.Method {
	return map[string]session.Method{
		"machine.identity":  m.callIdentity,
		"machine.rehearse":  m.callRehearse,
		"machine.seal":      m.callSeal,
		"machine.unseal":    m.callUnseal,
		"machine.health":    m.callHealth,
		"machine.resources": m.callResources,
		"machine.ports":     m.callPorts,
	}
}

type welcome struct {
	Version int    `json:"version"`
	Nonce   string `json:"nonce"`
	Build   string `json:"build"`
	PID     int    `json:"pid"`
	Sealed  bool   `json:"sealed"`
	Live    int    `json:"live"`
}

// Welcome is the body of HELLO_OK.
func (m *Machine) Welcome(nonce string) any {
	live, _ := m.Processes.Counts()
	m.mutex.Lock()
	defer m.mutex.Unlock()
	return welcome{frames.Version, nonce, m.Build, os.Getpid(), m.sealed, live}
}

// TokenMatches says whether a TCP host may speak. Before an identity there is no token and nothing to protect.
func (m *Machine) TokenMatches(token string) bool {
	m.mutex.Lock()
	defer m.mutex.Unlock()
	return m.token == "" || subtle.ConstantTimeCompare([]byte(token), []byte(m.token)) == 1
}

// Admit refuses what a sealed machine must not do, lets it wait while the machine is frozen, and keeps the idle clock. A
// call that was aborted while it waited does not run: in a copy of a machine it was meant for another one.
func (m *Machine) Admit(stream *session.Stream, method string) (leave func(), err error) {
	for {
		thawed, leave, err := m.admit(method)
		if thawed == nil {
			return leave, err
		}
		select {
		case <-stream.Done():
		case <-thawed:
		}
		if stream.Aborted() {
			return nil, session.ErrAborted
		}
	}
}

func (m *Machine) admit(method string) (thawed chan struct{}, leave func(), err error) {
	m.mutex.Lock()
	defer m.mutex.Unlock()
	switch method {
	case "machine.health", "machine.seal", "machine.unseal", "machine.identity", "machine.rehearse":
	case "file.scan", "file.digests", "file.read": // What was saved can be read in a copy that will never run.
	default:
		if m.thawed != nil {
			return m.thawed, nil, nil
		}
		if m.sealed {
			return nil, nil, faults.New("sealed", "sealed until the next identity")
		}
	}
	if strings.HasPrefix(method, "machine.") {
		return nil, func() {}, nil
	}
	m.calls++
	return nil, m.leave, nil
}

func (m *Machine) leave() {
	m.mutex.Lock()
	m.calls--
	m.lastCall = time.Now()
	m.mutex.Unlock()
}

type health struct {
	Version  int    `json:"version"`
	Build    string `json:"build"`
	UptimeMS int64  `json:"uptime_ms"`
	Sealed   bool   `json:"sealed"`
	Frozen   bool   `json:"frozen"`
	Live     int    `json:"live"`
	Baked    int    `json:"baked"`
	IdleMS   int64  `json:"idle_ms"`
}

func (m *Machine) callHealth(stream *session.Stream, _ []byte) error {
	live, baked := m.Processes.Counts()
	if live == 0 {
		live = m.Processes.Strays()
	}
	m.mutex.Lock()
	answer := health{Version: frames.Version, Build: m.Build, UptimeMS: time.Since(m.started).Milliseconds(),
		Sealed: m.sealed, Frozen: m.thawed != nil, Live: live, Baked: baked}
	if live == 0 && m.calls == 0 {
		answer.IdleMS = time.Since(m.lastCall).Milliseconds()
	}
	m.mutex.Unlock()
	return stream.Answer(answer)
}
