"""What every client does: calls, waits to be told that its token is revoked, calls again, and reads a stream as it comes."""


def take_turns(call, events):
    print(call(), flush=True)
    input()
    print(call(), flush=True)
    for event in events():
        print(event, flush=True)
