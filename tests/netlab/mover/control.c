/* The controller's words, one command a line; each is answered by "ok" or "error WHY".
 *
 * Numbers only, but for names of kinds; units are in the names below. `counters` answers with
 * several lines before its "ok". A command is checked whole before it changes anything.
 */
#include <arpa/inet.h>
#include <string.h>
#include <sys/resource.h>

#include "mover.h"

static const char *const KIND_NAMES[KINDS] = {
    "open", "firewall", "full-cone", "address-cone", "port-cone", "symmetric",
};
static const char *const DROP_NAMES[DROPS] = {
    "lost", "cut", "queue", "refused", "unroutable", "malformed", "full",
};

#define TAKES(count, ...) (sscanf(line, __VA_ARGS__, &end) == (count) && line[end] == 0)

static int is_node(unsigned i) { return i < NODES_MAX && world.nodes[i].used; }
static int is_host(unsigned i) { return i < HOSTS_MAX && world.hosts[i].used; }
static int is_protocol(unsigned i) { return i == 0 || i == TCP || i == UDP; }

static uint64_t seed_of(uint64_t a, uint64_t b, uint64_t c)
{
    uint64_t dice = a * 1000003 + b * 1009 + c + 1;
    roll(&dice);
    return roll(&dice);
}

static void tell_counters(FILE *out)
{
    struct rusage used;
    getrusage(RUSAGE_SELF, &used);
    for (int i = 0; i < HOSTS_MAX; i++) {
        const struct host *h = &world.hosts[i];
        if (!h->used) continue;
        for (int plane = 0; plane < PLANES_MAX; plane++)
            for (int wide = 0; wide < 2; wide++) {
                const struct tally *s = &h->sent[plane][wide], *a = &h->arrived[plane][wide];
                if (s->packets || a->packets)
                    fprintf(out, "moved %d %d %d %lu %lu %lu %lu\n", i, plane, wide,
                            s->packets, s->bytes, a->packets, a->bytes);
            }
        for (int why = 0; why < DROPS; why++)
            if (h->dropped[why].packets)
                fprintf(out, "dropped %d %s %lu %lu\n", i, DROP_NAMES[why],
                        h->dropped[why].packets, h->dropped[why].bytes);
        if (h->loss_runs) fprintf(out, "runs %d %lu\n", i, h->loss_runs);
    }
    fprintf(out, "mover %lu %lu %lu %lu %ld\n", world.in_flight, world.late_n, world.late_sum,
            world.late_max,
            (used.ru_utime.tv_sec + used.ru_stime.tv_sec) * 1000000L
                + used.ru_utime.tv_usec + used.ru_stime.tv_usec);
}

static const char *set_node(const char *line)
{
    unsigned id, region;
    unsigned long seed;
    char address[16], kind[16];
    double udp_s, tcp_s;
    int end = 0, k = 0;
    struct in_addr parsed;
    if (!TAKES(7, "node %u %u %15s %15s %lf %lf %lu%n", &id, &region, address, kind, &udp_s,
               &tcp_s, &seed)
        || id >= NODES_MAX || region >= NODES_MAX || !inet_aton(address, &parsed))
        return "node ID REGION ADDRESS KIND UDP_S TCP_S SEED";
    while (k < KINDS && strcmp(kind, KIND_NAMES[k])) k++;
    if (k == KINDS) return "no such kind";
    if (world.nodes[id].used) return "the node exists";
    struct node *n = &world.nodes[id];
    n->used = 1;
    n->region = region;
    n->kind = k;
    n->address = parsed.s_addr;
    n->router.udp_ns = (int64_t)(udp_s * SECOND);
    n->router.tcp_ns = (int64_t)(tcp_s * SECOND);
    n->router.dice = seed_of(seed, id, 65537);
    for (int i = 0; i < NODES_MAX; i++) {
        world.paths[id][i].dice = seed_of(seed, id, i);
        world.paths[i][id].dice = seed_of(seed, i, id);
    }
    return NULL;
}

static const char *set_host(const char *line)
{
    unsigned id, node;
    char address[16];
    int end = 0, fd;
    struct in_addr parsed;
    if (!TAKES(4, "host %u %u %15s %d%n", &id, &node, address, &fd) || id >= HOSTS_MAX
        || !is_node(node) || !inet_aton(address, &parsed) || fd < 0)
        return "host ID NODE ADDRESS FD";
    if (world.hosts[id].used) return "the host exists";
    struct host *h = &world.hosts[id];
    h->node = node;
    h->address = parsed.s_addr;
    h->fd = fd;
    h->used = 1;
    world.nodes[node].only_host = id;
    return NULL;
}

static const char *set_line(const char *line)
{
    unsigned id;
    double up, down, wide_up, wide_down, buffer_ms;
    int end = 0;
    if (!TAKES(6, "line %u %lf %lf %lf %lf %lf%n", &id, &up, &down, &wide_up, &wide_down,
               &buffer_ms)
        || !is_node(id) || buffer_ms < 0)
        return "line NODE UP_BPS DOWN_BPS WIDE_UP_BPS WIDE_DOWN_BPS BUFFER_MS";
    struct node *n = &world.nodes[id];
    set_rate(&n->up, up);
    set_rate(&n->down, down);
    set_rate(&n->wide_up, wide_up);
    set_rate(&n->wide_down, wide_down);
    n->buffer = (int64_t)(buffer_ms * 1e6);
    return NULL;
}

static const char *set_path(const char *line)
{
    unsigned a, b, reorder;
    double delay_ms, jitter_ms, loss, burst;
    int end = 0;
    if (!TAKES(7, "path %u %u %lf %lf %u %lf %lf%n", &a, &b, &delay_ms, &jitter_ms, &reorder,
               &loss, &burst)
        || !is_node(a) || !is_node(b) || delay_ms < 0 || jitter_ms < 0 || reorder > 1 || loss < 0
        || loss > 1 || burst < 0)
        return "path FROM TO DELAY_MS JITTER_MS REORDER LOSS BURST";
    struct path *p = &world.paths[a][b];
    p->delay = (int64_t)(delay_ms * 1e6);
    p->jitter = (int64_t)(jitter_ms * 1e6);
    p->wander_from = -4 * p->jitter; /* draw anew */
    p->reorder = reorder;
    p->loss = loss;
    p->burst = burst;
    return NULL;
}

static const char *set_cut(const char *line)
{
    unsigned a, b, cut;
    int end = 0;
    if (!TAKES(3, "cut %u %u %u%n", &a, &b, &cut) || !is_node(a) || !is_node(b) || cut > 1)
        return "cut FROM TO 0|1";
    world.paths[a][b].cut = cut;
    return NULL;
}

static const char *set_allow(const char *line)
{
    unsigned id, port;
    int end = 0;
    if (!TAKES(2, "allow %u %u%n", &id, &port) || !is_node(id) || port - 1 > 65534)
        return "allow NODE PORT";
    struct router *r = &world.nodes[id].router;
    if (world.nodes[id].kind == OPEN) return "an open node allows everything";
    if (r->allowed_n == RULES_MAX) return "too many ports";
    r->allowed[r->allowed_n++] = htons(port);
    return NULL;
}

static const char *set_forward(const char *line)
{
    unsigned id, protocol, outer, host, inner;
    int end = 0;
    if (!TAKES(5, "forward %u %u %u %u %u%n", &id, &protocol, &outer, &host, &inner)
        || !is_node(id) || !is_host(host) || world.hosts[host].node != id || !protocol
        || !is_protocol(protocol) || outer - 1 > 65534 || inner - 1 > 65534)
        return "forward NODE PROTOCOL OUTER_PORT HOST INNER_PORT";
    struct router *r = &world.nodes[id].router;
    if (r->forwards_n == RULES_MAX) return "too many forwarded ports";
    r->forwards[r->forwards_n++] = (struct forward){protocol, host, htons(outer), htons(inner)};
    return NULL;
}

static const char *set_plane(const char *line)
{
    unsigned plane, protocol, first, last;
    int end = 0;
    if (!TAKES(4, "plane %u %u %u %u%n", &plane, &protocol, &first, &last)
        || plane >= PLANES_MAX || !is_protocol(protocol) || first > last || last > 65535)
        return "plane ID PROTOCOL FIRST_PORT LAST_PORT";
    if (world.rules_n == RULES_MAX) return "too many rules";
    world.rules[world.rules_n++] = (struct plane_rule){plane, protocol, first, last};
    return NULL;
}

static const struct { const char *name; const char *(*run)(const char *); } COMMANDS[] = {
    {"node ", set_node}, {"host ", set_host}, {"line ", set_line}, {"path ", set_path},
    {"cut ", set_cut}, {"allow ", set_allow}, {"forward ", set_forward}, {"plane ", set_plane},
};

int obey(char *line, FILE *out)
{
    const char *wrong = "no such command";
    if (!strcmp(line, "counters")) {
        tell_counters(out);
        wrong = NULL;
    }
    for (unsigned i = 0; i < sizeof COMMANDS / sizeof *COMMANDS; i++)
        if (!strncmp(line, COMMANDS[i].name, strlen(COMMANDS[i].name)))
            wrong = COMMANDS[i].run(line);
    if (wrong) fprintf(out, "error %s\n", wrong);
    else fputs("ok\n", out);
    return fflush(out);
}
