/* The packet mover: reads every IP packet of every host and moves it as the controller wishes.
 *
 *     mover COMMAND [ARGUMENT ...]      (standard input is a socket to the controller)
 *
 * When the controller's end closes, however it died, the mover closes its TUN devices (they vanish)
 * and becomes COMMAND, which removes the rest of the laboratory.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

#include "mover.h"

#define CONTROL 0
#define TURN_PACKETS 32        /* from one host before the others and the due ones have their turn */
#define LINE_BYTES_MAX 65536

struct world world;

int64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * SECOND + t.tv_nsec;
}

/* splitmix64 (Steele, Lea, Flood 2014) */
uint64_t roll(uint64_t *dice)
{
    uint64_t z = *dice += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

double chance(uint64_t *dice) { return (double)(roll(dice) >> 11) * 0x1p-53; }

static void read_host(int id)
{
    static uint8_t excess[65536];
    for (int i = 0; i < TURN_PACKETS; i++) {
        struct packet *p = packet_new();
        ssize_t n;
        if (!p) { /* out of memory for packets: it is read, counted and gone */
            struct host *h = &world.hosts[id];
            n = read(h->fd, excess, sizeof excess);
            if (n <= 0) return;
            h->sent[0][0].packets++, h->sent[0][0].bytes += n;
            h->dropped[FULL].packets++, h->dropped[FULL].bytes += n;
            continue;
        }
        n = read(world.hosts[id].fd, p->bytes, sizeof p->bytes);
        if (n <= 0) {
            packet_free(p);
            return;
        }
        p->length = n;
        p->sender = id;
        take(p, now_ns());
    }
}

/* Returns 0 when the controller is gone. */
static int read_control(FILE *out)
{
    static char buffer[LINE_BYTES_MAX];
    static size_t have;
    ssize_t n = recv(CONTROL, buffer + have, sizeof buffer - have, MSG_DONTWAIT);
    if (n < 0 && (errno == EAGAIN || errno == EINTR)) return 1;
    if (n <= 0) return 0;
    have += n;
    char *line = buffer, *end;
    while ((end = memchr(line, '\n', buffer + have - line))) {
        *end = 0;
        if (obey(line, out)) return 0;
        line = end + 1;
    }
    have = buffer + have - line;
    memmove(buffer, line, have);
    return have < sizeof buffer;
}

static int watch(int epoll, int fd, uint32_t what)
{
    struct epoll_event event = {.events = EPOLLIN, .data.u32 = what};
    return epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event);
}

int main(int argc, char **argv)
{
    enum { TIMER = HOSTS_MAX, CONTROLLER };
    int epoll = epoll_create1(EPOLL_CLOEXEC);
    int timer = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);
    FILE *out = fdopen(dup(CONTROL), "w");
    int watched[HOSTS_MAX] = {0};
    int64_t armed = INT64_MAX;
    if (argc < 2 || epoll < 0 || timer < 0 || !out || watch(epoll, timer, TIMER)
        || watch(epoll, CONTROL, CONTROLLER)) {
        perror("mover");
        return 1;
    }
    signal(SIGPIPE, SIG_IGN);
    for (int alive = 1; alive;) {
        struct epoll_event events[HOSTS_MAX];
        int n = epoll_wait(epoll, events, HOSTS_MAX, -1);
        for (int i = 0; i < n; i++) {
            if (events[i].data.u32 == CONTROLLER) {
                alive = read_control(out);
                for (int h = 0; h < HOSTS_MAX; h++)
                    if (world.hosts[h].used && !watched[h])
                        watched[h] = !watch(epoll, world.hosts[h].fd, h);
            } else if (events[i].data.u32 == TIMER) {
                uint64_t times;
                if (read(timer, &times, sizeof times) > 0) armed = INT64_MAX;
            } else {
                read_host(events[i].data.u32);
            }
        }
        int64_t next = run_due(now_ns());
        if (next < armed) {
            struct itimerspec at = {.it_value = {next / SECOND, next % SECOND}};
            timerfd_settime(timer, TFD_TIMER_ABSTIME, &at, NULL);
            armed = next;
        }
    }
    for (int h = 0; h < HOSTS_MAX; h++)
        if (world.hosts[h].used) close(world.hosts[h].fd);
    fclose(out);
    execvp(argv[1], argv + 1);
    return 1;
}
