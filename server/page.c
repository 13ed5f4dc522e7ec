/* The page at /: files of web/, as the build makes sources of them. */
#include <inttypes.h>
#include <stdio.h>

#include "core.h"

extern const unsigned char page_html[], page_css[], page_js[], page_icon[];
extern const size_t page_html_bytes, page_css_bytes, page_js_bytes, page_icon_bytes;

static void reply(struct call *call, const char *type, const unsigned char *data, size_t n)
{
    uint64_t hash = 14695981039346656037u; /* FNV-1a */
    for (size_t i = 0; i < n; i++) hash = (hash ^ data[i]) * 1099511628211u;
    snprintf(call->etag, sizeof call->etag, "\"%016" PRIx64 "\"", hash);
    bytes_append(&call->reply, data, n);
    call->status = 200;
    call->reply_type = type;
    call->page = true;
}

void route_page(struct call *call)
{
    reply(call, "text/html; charset=utf-8", page_html, page_html_bytes);
}

void route_page_css(struct call *call)
{
    reply(call, "text/css; charset=utf-8", page_css, page_css_bytes);
}

void route_page_js(struct call *call)
{
    reply(call, "text/javascript; charset=utf-8", page_js, page_js_bytes);
}

void route_page_icon(struct call *call)
{
    reply(call, "image/svg+xml", page_icon, page_icon_bytes);
}
