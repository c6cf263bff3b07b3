package machine

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"syscall"

	"pandastack/guest/internal/session"
)

const (
	maxPorts       = 1024
	ticksPerSecond = 100 // USER_HZ, the same on every Linux
	stateListen    = "0A"
)

type resources struct {
	MemoryTotal     int64   `json:"memory_total_bytes"`
	MemoryAvailable int64   `json:"memory_available_bytes"`
	CPUSeconds      float64 `json:"cpu_seconds"`
	Load            float64 `json:"load_1m"`
	DiskTotal       int64   `json:"disk_total_bytes"`
	DiskFree        int64   `json:"disk_free_bytes"`
	Processes       int     `json:"processes"`
}

func (m *Machine) callResources(stream *session.Stream, _ []byte) error {
	var answer resources
	answer.MemoryTotal, answer.MemoryAvailable = memory()
	answer.CPUSeconds = cpuSeconds()
	if text, err := os.ReadFile("/proc/loadavg"); err == nil {
		first, _, _ := strings.Cut(string(text), " ")
		answer.Load, _ = strconv.ParseFloat(first, 64)
	}
	var disk syscall.Statfs_t
	if syscall.Statfs("/", &disk) == nil {
		answer.DiskTotal, answer.DiskFree = int64(disk.Blocks)*int64(disk.Bsize), int64(disk.Bavail)*int64(disk.Bsize)
	}
	answer.Processes = len(pids())
	return stream.Answer(answer)
}

func memory() (total, available int64) {
	text, _ := os.ReadFile("/proc/meminfo")
	for line := range strings.Lines(string(text)) {
		fields := strings.Fields(line)
		if len(fields) < 2 {
			continue
		}
		kib, _ := strconv.ParseInt(fields[1], 10, 64)
		switch fields[0] {
		case "MemTotal:":
			total = kib << 10
		case "MemAvailable:":
			available = kib << 10
		}
	}
	return total, available
}

// cpuSeconds is what the kernel counts as busy; gVisor counts nothing there, so then ours and our children's.
func cpuSeconds() float64 {
	text, _ := os.ReadFile("/proc/stat")
	line, _, _ := strings.Cut(string(text), "\n")
	var ticks float64
	for index, field := range strings.Fields(line) {
		if index == 0 || index == 4 || index == 5 || index > 8 { // the name, idle, iowait, guest time (counted already)
			continue
		}
		value, _ := strconv.ParseFloat(field, 64)
		ticks += value
	}
	if ticks > 0 {
		return ticks / ticksPerSecond
	}
	var seconds float64
	for _, who := range []int{syscall.RUSAGE_SELF, syscall.RUSAGE_CHILDREN} {
		var usage syscall.Rusage
		if syscall.Getrusage(who, &usage) == nil {
			seconds += float64(usage.Utime.Nano()+usage.Stime.Nano()) / 1e9
		}
	}
	return seconds
}

func pids() []string {
	directory, err := os.Open("/proc")
	if err != nil {
		return nil
	}
	defer directory.Close()
	names, _ := directory.Readdirnames(-1)
	found := names[:0]
	for _, name := range names {
		if name[0] >= '1' && name[0] <= '9' {
			found = append(found, name)
		}
	}
	return found
}

type port struct {
	Port    uint16 `json:"port"`
	Address string `json:"address"`
	PID     *int   `json:"pid"`
	inode   string
}

func (m *Machine) callPorts(stream *session.Stream, _ []byte) error {
	found := []port{}
	for _, path := range []string{"/proc/net/tcp", "/proc/net/tcp6"} {
		text, err := os.ReadFile(path)
		if err != nil {
			continue
		}
		for line := range bytes.Lines(text) {
			entry, ok := parsePort(string(line))
			if ok && entry.Port != m.ListenPort && len(found) < maxPorts {
				found = append(found, entry)
			}
		}
	}
	findOwners(found)
	return stream.Answer(map[string]any{"ports": found})
}

// parsePort reads a line of /proc/net/tcp. Addresses are words of four bytes in the machine's order (little endian on
// both of ours), the port is a plain number.
func parsePort(line string) (port, bool) {
	fields := strings.Fields(line)
	if len(fields) < 10 || fields[3] != stateListen {
		return port{}, false
	}
	addressText, portText, _ := strings.Cut(fields[1], ":")
	number, err := strconv.ParseUint(portText, 16, 16)
	raw, hexErr := hex.DecodeString(addressText)
	if err != nil || hexErr != nil || len(raw)%4 != 0 {
		return port{}, false
	}
	for at := 0; at < len(raw); at += 4 {
		binary.BigEndian.PutUint32(raw[at:], binary.LittleEndian.Uint32(raw[at:]))
	}
	address, ok := netip.AddrFromSlice(raw)
	return port{Port: uint16(number), Address: address.String(), inode: fields[9]}, ok
}

func findOwners(ports []port) {
	wanted := map[string][]int{}
	for index, entry := range ports {
		if entry.inode != "0" {
			wanted["socket:["+entry.inode+"]"] = append(wanted["socket:["+entry.inode+"]"], index)
		}
	}
	if len(wanted) == 0 {
		return
	}
	for _, pid := range pids() {
		directory, err := os.Open("/proc/" + pid + "/fd")
		if err != nil {
			continue
		}
		names, _ := directory.Readdirnames(-1)
		_ = directory.Close()
		for _, name := range names {
			target, err := os.Readlink("/proc/" + pid + "/fd/" + name)
			if err != nil {
				continue
			}
			for _, index := range wanted[target] {
				if number, err := strconv.Atoi(pid); err == nil && ports[index].PID == nil {
					ports[index].PID = &number
				}
			}
		}
	}
}
