/* Start-up and console of QEMU's mps2 boards, for the self-test of an exported network. No libc.
 *
 * The console is ARM semihosting: the debugger, here QEMU, prints and ends the run.
 */
#include <stdint.h>

#include "eqnet.h"
#include "vectors.h"

int eqnet_selftest(void);
void reset(void);
void *memset(void *to, int value, unsigned long count);
void *memcpy(void *to, const void *from, unsigned long count);

extern uint32_t board_data_load, board_data_start, board_data_end, board_bss_start, board_bss_end, board_stack_top;

__attribute__((section(".vectors"), used)) static void *const vectors[2] = {&board_stack_top, (void *)reset};

/* What compilers may call even without a libc. */
void *memset(void *to, int value, unsigned long count)
{
    volatile unsigned char *p = to;
    while (count-- > 0) {
        *p++ = (unsigned char)value;
    }
    return to;
}

void *memcpy(void *to, const void *from, unsigned long count)
{
    volatile unsigned char *p = to;
    const unsigned char *q = from;
    while (count-- > 0) {
        *p++ = *q++;
    }
    return to;
}

static void host(uint32_t call, const void *argument)
{
    register uint32_t r0 __asm__("r0") = call;
    register const void *r1 __asm__("r1") = argument;
    __asm__ volatile("bkpt 0xAB" : "+r"(r0) : "r"(r1) : "memory");
}

static void print(const char *text)
{
    host(0x04u, text); /* SYS_WRITE0 */
}

static void print_number(const char *before, uint32_t value, const char *after)
{
    char digits[12];
    int at = 11;
    digits[11] = 0;
    do {
        uint32_t tenth = 0;
        uint32_t rest = value;
        while (rest >= 10u) {
            rest -= 10u;
            ++tenth;
        }
        digits[--at] = (char)('0' + rest);
        value = tenth;
    } while (value != 0u);
    print(before);
    print(digits + at);
    print(after);
}

#define PAINTED 4096
#define PAINT 0xA5A5A5A5u

/* Bytes of stack that one inference takes: the stack below is painted, then looked at. */
static __attribute__((noinline)) uint32_t stack_used(void)
{
    volatile uint32_t *const top = (volatile uint32_t *)__builtin_frame_address(0) - 16;
    static int32_t scores[EQNET_CLASSES];
    uint32_t i;
    for (i = 1; i <= PAINTED / 4; ++i) {
        top[-(int32_t)i] = PAINT;
    }
    (void)eqnet_scores(eqnet_vector_inputs[2], scores);
    for (i = PAINTED / 4; i > 0 && top[-(int32_t)i] == PAINT; --i) {
    }
    return 4u * i + 64u;
}

void reset(void)
{
    static const uint32_t exit_well[2] = {0x20026u, 0u};
    static const uint32_t exit_badly[2] = {0x20026u, 1u};
    const uint32_t *from = &board_data_load;
    uint32_t *to;
    int wrong;
    for (to = &board_data_start; to < &board_data_end; ++to, ++from) {
        *to = *from;
    }
    for (to = &board_bss_start; to < &board_bss_end; ++to) {
        *to = 0;
    }
    print_number("stack of one inference: ", stack_used(), " bytes\n");
    wrong = eqnet_selftest();
    print_number(wrong == 0 ? "bit for bit, differences: " : "DIFFERENCES: ", (uint32_t)wrong, "\n");
    host(0x20u, wrong == 0 ? exit_well : exit_badly); /* SYS_EXIT_EXTENDED */
    for (;;) {
    }
}
