/* Routers and firewalls: who may send what to whom, and under which address it is seen.
 *
 * In RFC 4787's words: every kind but SYMMETRIC maps independently of the endpoint (one outer port
 * per inner port, whoever is spoken to); FIREWALL does not translate; PORT_CONE, SYMMETRIC and
 * FIREWALL filter by address and port, ADDRESS_CONE by address, FULL_CONE not at all. Only outbound
 * packets make and refresh a flow. No hairpinning; fragments and ICMP other than echo do not pass.
 */
#include <stdlib.h>
#include <string.h>

#include "mover.h"

#define ICMP_NS (60 * SECOND)
#define FIN_NS (120 * SECOND) /* Linux's conntrack waits as long in FIN_WAIT */
#define RST_NS (10 * SECOND)  /* and as long in CLOSE */

int read_layer4(struct packet *p, struct layer4 *out)
{
    int header = (p->bytes[0] & 15) * 4;
    uint8_t *at = p->bytes + header;
    int left = p->length - header;
    out->protocol = p->bytes[9];
    out->tcp_flags = NULL;
    if ((p->bytes[6] & 0x3f) || p->bytes[7]) return 0; /* more fragments, or an offset */
    switch (out->protocol) {
    case TCP:
        if (left < 20) return 0;
        out->tcp_flags = at + 13;
        out->checksum = (uint16_t *)(at + 16);
        break;
    case UDP:
        if (left < 8) return 0;
        out->checksum = (uint16_t *)(at + 6);
        break;
    case ICMP:
        if (left < 8 || (at[0] != 0 && at[0] != 8)) return 0;
        out->checksum = (uint16_t *)(at + 2);
        out->source = out->destination = (uint16_t *)(at + 4);
        return 1;
    default:
        return 0;
    }
    out->source = (uint16_t *)at;
    out->destination = (uint16_t *)(at + 2);
    return 1;
}

/* An ICMP echo has one number that serves as a port; its remote port is always 0. */
static uint16_t remote_port(const struct layer4 *l, const uint16_t *port)
{
    return l->protocol == ICMP ? 0 : *port;
}

/* ── rewriting (RFC 1624: the sum is corrected by what changed) ───────────────────────── */
static void correct(uint16_t *sum, uint16_t old, uint16_t new)
{
    uint32_t s = (uint16_t)~*sum + (uint32_t)(uint16_t)~old + new;
    s = (s & 0xffff) + (s >> 16);
    s = (s & 0xffff) + (s >> 16);
    *sum = (uint16_t)~s;
}

static void rewrite(struct packet *p, struct layer4 *l, int at, uint32_t address, uint16_t *port,
                    uint16_t value)
{
    uint16_t old[2], new[2];
    int summed = l->protocol != UDP || *l->checksum;
    memcpy(old, p->bytes + at, 4);
    memcpy(new, &address, 4);
    memcpy(p->bytes + at, &address, 4);
    for (int i = 0; i < 2; i++) {
        correct((uint16_t *)(p->bytes + 10), old[i], new[i]);
        if (summed && l->protocol != ICMP) correct(l->checksum, old[i], new[i]);
    }
    if (summed) correct(l->checksum, *port, value);
    if (l->protocol == UDP && summed && !*l->checksum) *l->checksum = 0xffff;
    *port = value;
}

/* ── the table of flows ───────────────────────────────────────────────────────────────── */
static int out_slot(uint8_t protocol, uint32_t inner, uint16_t port)
{
    return (int)((protocol * 31u ^ inner * 2654435761u ^ port * 40503u) >> 6) & (FLOW_CHAINS - 1);
}

static int in_slot(uint8_t protocol, uint16_t outer_port)
{
    return (int)(protocol * 31u ^ outer_port * 40503u) & (FLOW_CHAINS - 1);
}

static int expired(const struct router *r, const struct flow *f, int64_t now)
{
    int64_t keep = f->protocol == UDP ? r->udp_ns : f->protocol == ICMP ? ICMP_NS
        : f->ending == 2 ? RST_NS : f->ending == 1 ? FIN_NS : r->tcp_ns;
    return now - f->last > keep;
}

static void unchain(struct router *r, int16_t *chain, int i, int out)
{
    while (*chain != i)
        chain = out ? &r->flows[*chain].next_out : &r->flows[*chain].next_in;
    *chain = out ? r->flows[i].next_out : r->flows[i].next_in;
}

static void forget(struct router *r, int i)
{
    struct flow *f = &r->flows[i];
    unchain(r, &r->out_chain[out_slot(f->protocol, f->inner, f->inner_port)], i, 1);
    unchain(r, &r->in_chain[in_slot(f->protocol, f->outer_port)], i, 0);
    f->used = 0;
}

static int place(struct router *r, int64_t now)
{
    int found = -1;
    for (int i = 0; i < FLOWS_MAX; i++) {
        if (r->flows[i].used && expired(r, &r->flows[i], now)) forget(r, i);
        if (!r->flows[i].used && found < 0) found = i;
    }
    return found;
}

static int taken(const struct router *r, uint8_t protocol, uint16_t outer_port)
{
    for (int i = r->in_chain[in_slot(protocol, outer_port)]; i >= 0; i = r->flows[i].next_in)
        if (r->flows[i].protocol == protocol && r->flows[i].outer_port == outer_port) return 1;
    for (int i = 0; i < r->forwards_n; i++)
        if (r->forwards[i].protocol == protocol && r->forwards[i].outer_port == outer_port)
            return 1;
    return 0;
}

static uint16_t fresh_port(struct router *r, uint8_t protocol)
{
    /* 40,000 ports and at most 4,096 flows: one try in ten fails. */
    for (;;) {
        uint16_t port = __builtin_bswap16(20000 + roll(&r->dice) % 40000);
        if (!taken(r, protocol, port)) return port;
    }
}

static int may_leave(const struct router *r, const struct layer4 *l)
{
    if (!r->allowed_n) return 1;
    for (int i = 0; i < r->allowed_n; i++)
        if (l->protocol != ICMP && r->allowed[i] == *l->destination) return 1;
    return 0;
}

static struct flow *flow_out(struct node *n, struct packet *p, struct layer4 *l, int64_t now)
{
    struct router *r = &n->router;
    uint32_t inner = get_source(p), remote = get_destination(p);
    uint16_t port = remote_port(l, l->destination);
    int slot = out_slot(l->protocol, inner, *l->source);
    struct flow *twin = NULL;

    if (!r->flows) {
        r->flows = calloc(FLOWS_MAX, sizeof *r->flows);
        if (!r->flows) return NULL;
        memset(r->out_chain, 0xff, sizeof r->out_chain);
        memset(r->in_chain, 0xff, sizeof r->in_chain);
    }
    for (int i = r->out_chain[slot]; i >= 0; i = r->flows[i].next_out) {
        struct flow *f = &r->flows[i];
        if (f->protocol != l->protocol || f->inner != inner || f->inner_port != *l->source
            || expired(r, f, now))
            continue;
        if (f->remote == remote && f->remote_port == port) return f;
        twin = f;
    }
    if (!may_leave(r, l)) return NULL;
    uint16_t outer = n->kind == FIREWALL ? *l->source
        : twin && n->kind != SYMMETRIC ? twin->outer_port : fresh_port(r, l->protocol);
    int i = place(r, now);
    if (i < 0) return NULL;
    struct flow *f = &r->flows[i];
    *f = (struct flow){
        .inner = inner, .remote = remote, .inner_port = *l->source, .outer_port = outer,
        .remote_port = port, .protocol = l->protocol, .host = p->sender, .used = 1,
        .next_out = r->out_chain[slot], .next_in = r->in_chain[in_slot(l->protocol, outer)],
    };
    r->out_chain[slot] = r->in_chain[in_slot(l->protocol, outer)] = (int16_t)i;
    return f;
}

static void mind_ending(struct flow *f, const struct layer4 *l)
{
    if (!l->tcp_flags) return;
    if (*l->tcp_flags & 4) f->ending = 2;
    else if (*l->tcp_flags & 2) f->ending = 0;
    else if ((*l->tcp_flags & 1) && !f->ending) f->ending = 1;
}

/* ── the door, both ways ──────────────────────────────────────────────────────────────── */
int pass_out(struct node *n, struct packet *p, int64_t now)
{
    struct layer4 l;
    if (n->kind == OPEN) return 1;
    if (!read_layer4(p, &l)) return 0;
    for (int i = 0; i < n->router.forwards_n; i++) {
        const struct forward *w = &n->router.forwards[i];
        if (w->protocol != l.protocol || w->host != p->sender || w->inner_port != *l.source)
            continue;
        rewrite(p, &l, 12, n->address, l.source, w->outer_port);
        return 1;
    }
    struct flow *f = flow_out(n, p, &l, now);
    if (!f) return 0;
    f->last = now;
    mind_ending(f, &l);
    if (n->kind != FIREWALL) rewrite(p, &l, 12, n->address, l.source, f->outer_port);
    return 1;
}

int pass_in(struct node *n, struct packet *p, int64_t now)
{
    struct router *r = &n->router;
    struct layer4 l;
    p->receiver = n->only_host;
    if (n->kind == OPEN) return 1;
    if (!read_layer4(p, &l)) return 0;
    for (int i = 0; i < r->forwards_n; i++) {
        const struct forward *w = &r->forwards[i];
        if (w->protocol != l.protocol || w->outer_port != *l.destination) continue;
        p->receiver = w->host;
        rewrite(p, &l, 16, world.hosts[w->host].address, l.destination, w->inner_port);
        return 1;
    }
    if (!r->flows) return 0;
    for (int i = r->in_chain[in_slot(l.protocol, *l.destination)]; i >= 0;
         i = r->flows[i].next_in) {
        struct flow *f = &r->flows[i];
        if (f->protocol != l.protocol || f->outer_port != *l.destination || expired(r, f, now))
            continue;
        int address = f->remote == get_source(p);
        int exact = address && f->remote_port == remote_port(&l, l.source);
        if (!exact && n->kind != FULL_CONE && !(n->kind == ADDRESS_CONE && address)) continue;
        if (exact) mind_ending(f, &l);
        p->receiver = f->host;
        if (n->kind != FIREWALL) rewrite(p, &l, 16, f->inner, l.destination, f->inner_port);
        return 1;
    }
    return 0;
}
