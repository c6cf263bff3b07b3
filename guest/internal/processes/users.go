package processes

import (
	"os"
	"strconv"
	"strings"
	"sync"
	"syscall"

	"pandastack/guest/internal/faults"
)

// User is one line of /etc/passwd with the groups it is in.
type User struct {
	Name        string
	UID, GID    uint32
	Home, Shell string
	Groups      []uint32
}

// database caches a file until its time, size or inode change: the hot path looks at it on every spawn.
type database struct {
	path  string
	mutex sync.Mutex
	seen  syscall.Stat_t
	lines [][]string
}

var passwd, group = &database{path: "/etc/passwd"}, &database{path: "/etc/group"}

func (d *database) read() [][]string {
	d.mutex.Lock()
	defer d.mutex.Unlock()
	var now syscall.Stat_t
	if syscall.Stat(d.path, &now) != nil || now.Size > 4<<20 {
		return nil
	}
	if d.lines != nil && now.Mtim == d.seen.Mtim && now.Size == d.seen.Size && now.Ino == d.seen.Ino {
		return d.lines
	}
	text, err := os.ReadFile(d.path)
	if err != nil {
		return nil
	}
	d.lines, d.seen = [][]string{}, now
	for line := range strings.Lines(string(text)) {
		d.lines = append(d.lines, strings.Split(strings.TrimRight(line, "\n"), ":"))
	}
	return d.lines
}

func number(text string) (uint32, bool) {
	value, err := strconv.ParseUint(text, 10, 32)
	return uint32(value), err == nil
}

// FindUser looks a name or uid up. A uid without a line is a user without a name, in the group of the same number.
func FindUser(wanted string) (User, error) {
	if wanted == "" {
		wanted = "root"
	}
	uid, numeric := number(wanted)
	for _, field := range passwd.read() {
		if len(field) < 7 {
			continue
		}
		lineUID, okUID := number(field[2])
		lineGID, okGID := number(field[3])
		if !okUID || !okGID || field[0] != wanted && !(numeric && lineUID == uid) {
			continue
		}
		user := User{Name: field[0], UID: lineUID, GID: lineGID, Home: field[5], Shell: field[6]}
		user.Groups = groupsOf(user)
		return user, nil
	}
	switch {
	case wanted == "root" || numeric && uid == 0: // An image may have no /etc/passwd at all.
		return User{Name: "root", Home: "/root", Shell: "/bin/sh", Groups: []uint32{}}, nil
	case numeric:
		return User{Name: wanted, UID: uid, GID: uid, Home: "/", Shell: "/bin/sh", Groups: []uint32{}}, nil
	}
	return User{}, faults.New("unknown_user", "no user %.64q", wanted)
}

func groupsOf(user User) []uint32 {
	groups := []uint32{}
	for _, field := range group.read() {
		if len(field) < 4 {
			continue
		}
		gid, ok := number(field[2])
		if !ok || gid == user.GID {
			continue
		}
		for member := range strings.SplitSeq(field[3], ",") {
			if member == user.Name {
				groups = append(groups, gid)
				break
			}
		}
	}
	return groups
}

// FindOwner reads "name", "name:group" or numbers in either place.
func FindOwner(wanted string) (uid, gid int, err error) {
	name, groupName, both := strings.Cut(wanted, ":")
	if name == "" {
		return 0, 0, faults.Invalid("owner %.64q", wanted)
	}
	user, err := FindUser(name)
	if err != nil || !both {
		return int(user.UID), int(user.GID), err
	}
	if gid, numeric := number(groupName); numeric {
		return int(user.UID), int(gid), nil
	}
	for _, field := range group.read() {
		if len(field) >= 3 && field[0] == groupName {
			if gid, ok := number(field[2]); ok {
				return int(user.UID), int(gid), nil
			}
		}
	}
	return 0, 0, faults.New("unknown_user", "no group %.64q", groupName)
}
