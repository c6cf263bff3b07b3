package machine

import (
	"testing"
	"time"

	"pandastack/guest/internal/session"
)

func TestParsePort(t *testing.T) {
	for line, wanted := range map[string]string{
		"0: 0100007F:1F90 00000000:0000 0A 0:0 00:0 0 0 0 4711 1":                                       "127.0.0.1",
		"0: 00000000000000000000000001000000:1F90 00000000000000000000000000000000:0 0A a b c d e 4711": "::1",
	} {
		found, ok := parsePort(line)
		if !ok || found.Port != 8080 || found.Address != wanted || found.inode != "4711" {
			t.Fatal(found, ok)
		}
	}
	for _, line := range []string{"", "sl local_address", "0: 0100007F:1F90 0:0 01 0:0 00:0 0 0 0 1 1", "0: xx:1 a 0A 1 2 3 4 5 6"} {
		if _, ok := parsePort(line); ok {
			t.Fatal(line)
		}
	}
}

type none struct{}

func (none) Counts() (int, int)               { return 0, 0 }
func (none) Strays() int                      { return 0 }
func (none) SetEnvironment(map[string]string) {}
func (none) Freeze() (int, error)             { return 0, nil }
func (none) Continue() int                    { return 0 }
func (none) Hook(string, string, time.Duration, <-chan struct{}) error {
	return nil
}

func (none) Rehearse(time.Duration, <-chan struct{}) error { return nil }

func TestSealedAdmitsOnlyTheMachine(t *testing.T) {
	machine := New("test", none{})
	machine.sealed = true
	for method, allowed := range map[string]bool{"process.run": false, "file.write": false, "file.list": false, "machine.warm": false,
		"machine.health": true, "machine.identity": true, "machine.rehearse": true, "machine.seal": true, "machine.unseal": true,
		"file.scan": true, "file.digests": true, "file.read": true} {
		if _, err := machine.Admit(&session.Stream{}, method); (err == nil) != allowed {
			t.Fatal(method, err)
		}
	}
}

func TestTokenIsAskedForOnceGiven(t *testing.T) {
	machine := New("test", none{})
	if !machine.TokenMatches("") {
		t.Fatal("nothing to protect yet")
	}
	machine.token = "secret"
	if machine.TokenMatches("") || machine.TokenMatches("secreT") || !machine.TokenMatches("secret") {
		t.Fatal("token")
	}
}
