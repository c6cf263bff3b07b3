// The daemon inside a sandbox. It answers one host over stdin and stdout, and others over TCP; see PROTOCOL.md.
// This file joins the parts: carriers, methods, signals.
package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"net"
	"os"
	"os/signal"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"
	"syscall"
	"time"
	"unsafe"

	"pandastack/guest/internal/boot"
	"pandastack/guest/internal/carriers"
	"pandastack/guest/internal/files"
	"pandastack/guest/internal/machine"
	"pandastack/guest/internal/processes"
	"pandastack/guest/internal/session"
)

const (
	build          = "0.11.0.dev0"
	helloTimeout   = 10 * time.Second
	maxConnections = 64
	memoryGoal     = 96 << 20

	portName     = "pandastack"
	vsockPort    = 1024
	portPatience = 10 * time.Second
	portLook     = 2 * time.Millisecond
)

func main() {
	if boot.Wanted() {
		// No TCP listener: no process inside can pretend to be the host.
		boot.Run("-machine", "-listen", "")
	}
	listen := flag.String("listen", "127.0.0.1:1024", "TCP address to serve besides stdin; empty for none")
	noStdio := flag.Bool("no-stdio", false, "do not speak over stdin and stdout")
	ownMachine := flag.Bool("machine", false, "kernel and devices are this sandbox's own: speak over virtio-serial and vsock, not stdin")
	hooks := flag.String("hooks", machine.HookDirectory, "directory of before-snapshot and after-restore")
	version := flag.Bool("version", false, "print the version and exit")
	flag.Parse()
	if *version {
		fmt.Println("pandastack-guest", build, runtime.GOARCH)
		return
	}
	// Small rather than fast: memory here is multiplied by every sandbox on the machine.
	debug.SetGCPercent(50)
	debug.SetMemoryLimit(memoryGoal)
	runtime.GOMAXPROCS(min(runtime.NumCPU(), 4))
	syscall.Umask(0o022)
	handleSignals()

	registry := processes.NewRegistry()
	state := machine.New(build, registry)
	server := &session.Server{Methods: map[string]session.Method{}, Welcome: state.Welcome, Token: state.TokenMatches,
		Admit: state.Admit}
	maps.Copy(server.Methods, registry.Methods())
	maps.Copy(server.Methods, state.Methods())
	maps.Copy(server.Methods, files.Methods())
	state.Hooks = *hooks
	if *ownMachine {
		state.Own = &machine.Own{Disk: boot.Disk, BootID: boot.BootID, Writable: func(wanted bool) error { return boot.Writable(boot.Home, wanted) }}
		for _, step := range []func() error{func() error { return registry.Confine(boot.Cgroup) }, state.Own.Settle} {
			if err := step(); err != nil {
				fmt.Fprintln(os.Stderr, "pandastack-guest:", err)
				boot.PowerOff()
			}
		}
	}
	state.EndOthers = server.EndOthers
	registry.Activity = func(live int) { server.Broadcast(map[string]any{"type": "activity", "live": live}) }

	if *listen != "" {
		listener, err := net.Listen("tcp", *listen)
		switch {
		case err == nil:
			state.ListenPort = uint16(listener.Addr().(*net.TCPAddr).Port)
			go accept(listener, server)
		case *noStdio && !*ownMachine:
			fmt.Fprintln(os.Stderr, "pandastack-guest:", err)
			os.Exit(1)
		default:
			// A sandbox without a network device, or a port that is taken, still has stdio.
			fmt.Fprintln(os.Stderr, "pandastack-guest:", err)
		}
	}
	switch {
	case *ownMachine:
		serveDevices(server)
	case !*noStdio:
		_ = server.Serve(descriptor(0), descriptor(1), stdio, func() {})
	}
	// Without stdin the daemon lives on: sandboxes outlive the host that started them.
	select {}
}

// handleSignals keeps the daemon alive as PID 1, where nobody but the runtime below may end it. Signals are caught
// and dropped instead of ignored, because an ignored signal would be inherited by every user process.
func handleSignals() {
	dropped := make(chan os.Signal, 1)
	numbers := []os.Signal{syscall.SIGHUP, syscall.SIGPIPE, syscall.SIGQUIT, syscall.SIGUSR1, syscall.SIGUSR2,
		syscall.SIGALRM, syscall.SIGABRT}
	if os.Getpid() == 1 {
		numbers = append(numbers, syscall.SIGTERM, syscall.SIGINT)
	}
	// Whoever started the daemon may ignore some itself, as a shell does for what it puts in the background.
	for number := syscall.Signal(1); number < 32; number++ {
		if signal.Ignored(number) {
			numbers = append(numbers, number)
		}
	}
	signal.Notify(dropped, numbers...)
	resetIgnored()
	go func() {
		for range dropped {
		}
	}()
}

// How the carriers differ; see PROTOCOL.md, section 1.
var (
	stdio  = session.Carrier{Trusted: true, Lasting: true}
	overVM = session.Carrier{Trusted: true} // Only the host reaches it.
	local  = session.Carrier{}
)

type connection interface {
	io.ReadWriteCloser
	SetReadDeadline(until time.Time) error
}

func openPort() (*carriers.Port, error) {
	deadline := time.Now().Add(portPatience)
	for time.Now().Before(deadline) {
		if device := carriers.FindPort("/sys", portName); device != "" {
			// Its device follows its entry.
			if port, err := carriers.OpenPort(device); err == nil || !errors.Is(err, fs.ErrNotExist) {
				return port, err
			}
		}
		time.Sleep(portLook)
	}
	return nil, fmt.Errorf("no port %s after %s", portName, portPatience)
}

func accept(listener net.Listener, server *session.Server) {
	serveEach(server, local, func() connection {
		for {
			connection, err := listener.Accept()
			if err == nil {
				return connection
			}
			time.Sleep(100 * time.Millisecond)
		}
	})
}

// serveEach serves what `next` waits for, a few at a time.
func serveEach(server *session.Server, carrier session.Carrier, next func() connection) {
	slots := make(chan struct{}, maxConnections)
	for {
		slots <- struct{}{}
		connection := next()
		go func() {
			defer func() { <-slots }()
			defer connection.Close()
			_ = connection.SetReadDeadline(time.Now().Add(helloTimeout))
			_ = server.Serve(connection, connection, carrier, func() { _ = connection.SetReadDeadline(time.Time{}) })
		}()
	}
}

// serveDevices speaks over what devices this machine has to its host. Without one it is of no use.
func serveDevices(server *session.Server) {
	listener, err := carriers.ListenVsock(vsockPort)
	if err == nil {
		links := carriers.NewLinks()
		go func() {
			for {
				go links.Take(listener.Accept())
			}
		}()
		go serveEach(server, overVM, func() connection { return links.Next() })
		if !carriers.HasPorts("/sys") {
			return
		}
	}
	port, err := openPort()
	if err != nil {
		fmt.Fprintln(os.Stderr, "pandastack-guest: no way to the host:", err)
		boot.PowerOff()
	}
	port.WaitForHost()
	err = server.Serve(port, port, session.Carrier{Trusted: true, Lasting: true, Next: port.WaitForHost}, func() {})
	fmt.Fprintln(os.Stderr, "pandastack-guest: the port to the host failed:", err)
}

// resetIgnored gives the default back to ignored signals that Go does not let anybody catch: those of job control, and
// 32 and 33, which C libraries keep for themselves and some programs ignore (make then hands that on to all it starts).
func resetIgnored() {
	status, _ := os.ReadFile("/proc/self/status")
	_, rest, _ := strings.Cut(string(status), "\nSigIgn:")
	line, _, _ := strings.Cut(rest, "\n")
	mask, _ := strconv.ParseUint(strings.TrimSpace(line), 16, 64)
	var byDefault [4]uint64 // struct sigaction of the kernel: all zero is SIG_DFL
	for number := uintptr(1); number <= 64; number++ {
		if mask&(1<<(number-1)) != 0 {
			_, _, _ = syscall.RawSyscall6(syscall.SYS_RT_SIGACTION, number, uintptr(unsafe.Pointer(&byDefault)), 0, 8, 0, 0)
		}
	}
}
