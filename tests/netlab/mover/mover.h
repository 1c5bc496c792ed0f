/* The packet mover's own words: nodes, hosts, paths, packets, and what is done to each.
 *
 * A host is a TUN device. A node is what others see: one public address with one access line, and
 * behind it one host (an open machine, a firewalled one) or several (a home behind a router). All
 * times are nanoseconds of CLOCK_MONOTONIC, all addresses and ports in network byte order.
 */
#ifndef MOVER_H
#define MOVER_H

#include <stdint.h>
#include <stdio.h>

#define NODES_MAX 64           /* the path table has a row per pair: 4096 of about 100 bytes */
#define HOSTS_MAX 64
#define PLANES_MAX 8
#define RULES_MAX 16           /* plane rules, and per node: forwarded ports, allowed ports */
#define FLOWS_MAX 4096         /* per router; home routers hold about as many */
#define FLOW_CHAINS 1024
#define PACKET_BYTES_MAX 1600
#define PACKETS_MAX 131072     /* in flight: 200 MiB, 1.6 s of 1 Gbit/s */

#define ICMP 1
#define TCP 6
#define UDP 17
#define SECOND 1000000000LL

enum drop { LOST, CUT, QUEUE, REFUSED, UNROUTABLE, MALFORMED, FULL, DROPS };
enum kind { OPEN, FIREWALL, FULL_CONE, ADDRESS_CONE, PORT_CONE, SYMMETRIC, KINDS };

struct packet {
    int64_t due;
    uint64_t order;            /* equal due times leave in the order of their coming */
    uint16_t length;
    uint8_t plane, wide, last; /* last: nothing is between it and its receiver but time */
    uint8_t sender, receiver;  /* hosts; the receiver is known once it passed the node's door */
    uint8_t from, to;          /* nodes */
    _Alignas(8) uint8_t bytes[PACKET_BYTES_MAX];
};

struct bucket { double ns_per_byte; int64_t free_at; };

struct path {
    int64_t delay, jitter;
    int64_t wander_from, wander_a, wander_b; /* jitter moves from a to b during one period */
    uint64_t dice;
    double loss, burst;        /* ratio; mean run of lost packets, 0 = independent of each other */
    uint8_t reorder, cut, bad, lost_last;
};

struct flow {
    int64_t last;
    uint32_t inner, remote;
    uint16_t inner_port, outer_port, remote_port;
    uint8_t protocol, host, ending, used; /* ending: 0 no, 1 a FIN was seen, 2 a RST */
    int16_t next_out, next_in;
};

struct forward { uint8_t protocol, host; uint16_t outer_port, inner_port; };

struct router {
    int64_t udp_ns, tcp_ns;
    uint64_t dice;
    int allowed_n, forwards_n;
    uint16_t allowed[RULES_MAX];
    struct forward forwards[RULES_MAX];
    struct flow *flows;        /* FLOWS_MAX of them, once there is anything to remember */
    int16_t out_chain[FLOW_CHAINS], in_chain[FLOW_CHAINS];
};

struct node {
    uint8_t used, region, kind, only_host;
    uint32_t address;
    int64_t buffer;            /* drop-tail: the longest wait in any of its queues */
    struct bucket up, down, wide_up, wide_down;
    struct router router;
};

struct tally { uint64_t packets, bytes; };

struct host {
    uint8_t used, node;
    int fd;
    uint32_t address;
    struct tally sent[PLANES_MAX][2], arrived[PLANES_MAX][2], dropped[DROPS];
    uint64_t loss_runs;
};

struct plane_rule { uint8_t plane, protocol; uint16_t first, last; };

struct world {
    struct node nodes[NODES_MAX];
    struct host hosts[HOSTS_MAX];
    struct path paths[NODES_MAX][NODES_MAX];
    struct plane_rule rules[RULES_MAX];
    int rules_n;
    uint64_t order, in_flight, late_n, late_sum, late_max;
};

/* What lies behind an IPv4 header; the pointers are into the packet. */
struct layer4 {
    uint16_t *source, *destination, *checksum;
    uint8_t *tcp_flags;
    uint8_t protocol;
};

extern struct world world;

int64_t now_ns(void);
uint64_t roll(uint64_t *dice);                      /* 64 random bits */
double chance(uint64_t *dice);                      /* uniform in [0, 1) */
int read_layer4(struct packet *p, struct layer4 *out); /* 0 if it has no ports or is a fragment */

/* link.c */
void take(struct packet *p, int64_t now);           /* a host sent it */
int64_t run_due(int64_t now);                       /* moves what is due; returns the next due time */
struct packet *packet_new(void);
void packet_free(struct packet *p);
void packet_drop(struct packet *p, enum drop why);
void set_rate(struct bucket *b, double bps);

/* nat.c */
int pass_out(struct node *n, struct packet *p, int64_t now);  /* 0 = refused */
int pass_in(struct node *n, struct packet *p, int64_t now);

/* control.c */
int obey(char *line, FILE *out);                    /* one command; writes its answer */

static inline uint32_t get_source(const struct packet *p)
{
    uint32_t address;
    __builtin_memcpy(&address, p->bytes + 12, 4);
    return address;
}

static inline uint32_t get_destination(const struct packet *p)
{
    uint32_t address;
    __builtin_memcpy(&address, p->bytes + 16, 4);
    return address;
}

#endif
