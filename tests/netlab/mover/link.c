/* What a line does to a packet: queue, lose, delay, deliver.
 *
 * Rates are kept in virtual time: a bucket knows when its line will be free, a packet leaves at that
 * time plus its own, and the next stage reckons from there and not from the clock. So the mover may
 * wake late without the error adding up. A line is a FIFO with a bound on the wait (drop-tail).
 */
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "mover.h"

struct entry { int64_t due; uint64_t order; struct packet *packet; };

static struct entry heap[PACKETS_MAX];
static int heap_n;
static struct packet *spare[PACKETS_MAX];
static int spare_n, made_n;

struct packet *packet_new(void)
{
    if (spare_n) return spare[--spare_n];
    if (made_n == PACKETS_MAX) return NULL;
    struct packet *p = malloc(sizeof *p);
    made_n += p != NULL;
    return p;
}

void packet_free(struct packet *p) { spare[spare_n++] = p; }

static void count(struct tally *t, const struct packet *p)
{
    t->packets++;
    t->bytes += p->length;
}

void packet_drop(struct packet *p, enum drop why)
{
    count(&world.hosts[p->sender].dropped[why], p);
    packet_free(p);
}

/* ── the heap by due time ─────────────────────────────────────────────────────────────── */
static int before(const struct entry *a, const struct entry *b)
{
    return a->due != b->due ? a->due < b->due : a->order < b->order;
}

static void push(struct packet *p)
{
    /* Never full: there is a place for every packet that packet_new hands out. */
    int i = heap_n++;
    p->order = world.order++;
    world.in_flight++;
    struct entry new = {p->due, p->order, p};
    while (i && before(&new, &heap[(i - 1) / 2])) {
        heap[i] = heap[(i - 1) / 2];
        i = (i - 1) / 2;
    }
    heap[i] = new;
}

static struct packet *pop(void)
{
    struct packet *top = heap[0].packet;
    struct entry moved = heap[--heap_n];
    int i = 0;
    for (;;) {
        int child = 2 * i + 1;
        if (child >= heap_n) break;
        if (child + 1 < heap_n && before(&heap[child + 1], &heap[child])) child++;
        if (!before(&heap[child], &moved)) break;
        heap[i] = heap[child];
        i = child;
    }
    heap[i] = moved;
    world.in_flight--;
    return top;
}

/* ── one line ─────────────────────────────────────────────────────────────────────────── */
void set_rate(struct bucket *b, double bps) { b->ns_per_byte = bps > 0 ? 8e9 / bps : 0; }

/* Moves *at to when the last bit has left; 0 if it would have to wait for longer than `buffer`. */
static int queue(struct bucket *b, int64_t *at, int length, int64_t buffer)
{
    if (b->ns_per_byte == 0) return 1;
    int64_t start = b->free_at > *at ? b->free_at : *at;
    if (start - *at > buffer) return 0;
    *at = b->free_at = start + (int64_t)(length * b->ns_per_byte);
    return 1;
}

/* Gilbert-Elliott with nothing lost in the good state and everything in the bad one: leaving the
 * bad state with 1/burst makes runs of `burst` on average, entering it with the probability below
 * makes `loss` of all packets lost. */
static int loses(struct path *path)
{
    if (path->loss <= 0) return 0;
    if (path->burst <= 0) return chance(&path->dice) < path->loss;
    double leave = 1 / path->burst;
    double enter = path->loss < 1 ? leave * path->loss / (1 - path->loss) : 1;
    path->bad = path->bad ? chance(&path->dice) >= leave : chance(&path->dice) < enter;
    return path->bad;
}

/* Without reordering, jitter wanders: it goes in straight lines between random points that are two
 * jitters apart in time, so it never shrinks faster than time passes and packets keep their order,
 * as they do behind a router whose queue grows and drains. */
static int64_t jitter(struct path *path, int64_t at)
{
    if (path->jitter <= 0) return 0;
    if (path->reorder) return (int64_t)(chance(&path->dice) * path->jitter);
    int64_t period = 2 * path->jitter;
    if (at >= path->wander_from + period) {
        int follows = at < path->wander_from + 2 * period;
        path->wander_a = follows ? path->wander_b : (int64_t)(chance(&path->dice) * path->jitter);
        path->wander_b = (int64_t)(chance(&path->dice) * path->jitter);
        path->wander_from = follows ? path->wander_from + period : at;
    }
    double done = at > path->wander_from ? (double)(at - path->wander_from) / period : 0;
    return path->wander_a + (int64_t)(done * (path->wander_b - path->wander_a));
}

static int plane_of(struct packet *p)
{
    struct layer4 l;
    if (!read_layer4(p, &l) || l.protocol == ICMP) return 0;
    uint16_t a = __builtin_bswap16(*l.source), b = __builtin_bswap16(*l.destination);
    for (int i = 0; i < world.rules_n; i++) {
        const struct plane_rule *r = &world.rules[i];
        if (r->protocol && r->protocol != l.protocol) continue;
        if ((a >= r->first && a <= r->last) || (b >= r->first && b <= r->last)) return r->plane;
    }
    return 0;
}

/* ── a packet's way ───────────────────────────────────────────────────────────────────── */
/* To a neighbour behind the same router: no line, no router, only the path of the node to itself. */
static int neighbour(const struct host *h, uint32_t address)
{
    if (h->address == world.nodes[h->node].address) return -1;
    for (int i = 0; i < HOSTS_MAX; i++)
        if (world.hosts[i].used && world.hosts[i].node == h->node
            && world.hosts[i].address == address)
            return i;
    return -1;
}

static int find_node(uint32_t address)
{
    for (int i = 0; i < NODES_MAX; i++)
        if (world.nodes[i].used && world.nodes[i].address == address) return i;
    return -1;
}

void take(struct packet *p, int64_t now)
{
    struct host *h = &world.hosts[p->sender];
    struct node *from = &world.nodes[h->node];
    int well_formed = p->length >= 20 && p->bytes[0] >> 4 == 4 && (p->bytes[0] & 15) >= 5
        && (p->bytes[0] & 15) * 4 <= p->length && (p->bytes[2] << 8 | p->bytes[3]) == p->length
        && get_source(p) == h->address;
    int near = well_formed ? neighbour(h, get_destination(p)) : -1;
    int to = !well_formed ? -1 : near >= 0 ? h->node : find_node(get_destination(p));

    p->plane = well_formed ? plane_of(p) : 0;
    p->from = h->node;
    p->to = to;
    p->wide = to >= 0 && world.nodes[to].region != from->region;
    p->last = near >= 0;
    p->receiver = near >= 0 ? near : 0;
    p->due = now;
    count(&h->sent[p->plane][p->wide], p);
    if (!well_formed) return packet_drop(p, MALFORMED);
    if (to < 0) return packet_drop(p, UNROUTABLE);
    if (near < 0) {
        /* A router does not turn a packet round to its own public address. */
        if (to == h->node || !pass_out(from, p, now)) return packet_drop(p, REFUSED);
        if (!queue(&from->up, &p->due, p->length, from->buffer)) return packet_drop(p, QUEUE);
        if (p->wide && !queue(&from->wide_up, &p->due, p->length, from->buffer))
            return packet_drop(p, QUEUE);
    }
    struct path *path = &world.paths[p->from][p->to];
    if (path->cut) return packet_drop(p, CUT);
    int lost = loses(path);
    h->loss_runs += lost && !path->lost_last;
    path->lost_last = lost;
    if (lost) return packet_drop(p, LOST);
    p->due += path->delay + jitter(path, p->due);
    push(p);
}

/* It has crossed the path and stands before the receiver's door and its line. */
static void come_in(struct packet *p)
{
    struct node *to = &world.nodes[p->to];
    int64_t came = p->due;
    if (world.paths[p->from][p->to].cut) return packet_drop(p, CUT);
    if (!pass_in(to, p, came)) return packet_drop(p, REFUSED);
    if (p->wide && !queue(&to->wide_down, &p->due, p->length, to->buffer))
        return packet_drop(p, QUEUE);
    if (!queue(&to->down, &p->due, p->length, to->buffer)) return packet_drop(p, QUEUE);
    p->last = 1;
    push(p);
}

static void deliver(struct packet *p)
{
    struct host *h = &world.hosts[p->receiver];
    if (write(h->fd, p->bytes, p->length) != p->length) return packet_drop(p, FULL);
    uint64_t late = now_ns() - p->due;
    world.late_n++;
    world.late_sum += late;
    if (late > world.late_max) world.late_max = late;
    count(&h->arrived[p->plane][p->wide], p);
    packet_free(p);
}

int64_t run_due(int64_t now)
{
    while (heap_n && heap[0].due <= now) {
        struct packet *p = pop();
        if (p->last) deliver(p);
        else come_in(p);
    }
    return heap_n ? heap[0].due : INT64_MAX;
}
